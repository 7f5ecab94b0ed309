// From integer sums to the real result.
#pragma once
#include "load.cuh"

INLINE float promote(int sum, float row_scale, float token_scale, float other) {
    return __fmaf_rn(static_cast<float>(sum) * row_scale, token_scale, other);
}
