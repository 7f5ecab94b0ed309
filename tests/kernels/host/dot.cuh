// The host's version of cuda/dot.cuh.
#pragma once
#include "load.cuh"

INLINE int dot_unsigned(uint32 a, uint32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<int>(a >> i & 255) * static_cast<signed char>(b >> i);
    return sum;
}

INLINE int dot_signed(uint32 a, uint32 b, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<signed char>(a >> i) * static_cast<signed char>(b >> i);
    return sum;
}
