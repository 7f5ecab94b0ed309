// From sums of products to the real result.
#pragma once
#include "load.cuh"

template <class Sum> INLINE float promote(Sum sum, float row_scale, float token_scale, float other) {
    return __fmaf_rn(static_cast<float>(sum) * row_scale, token_scale, other);
}
