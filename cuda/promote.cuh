// From integer sums to the real result.
#pragma once
#include "load.cuh"

INLINE float promote(int sum, float row_scale, float token_scale) { return static_cast<float>(sum) * row_scale * token_scale; }
