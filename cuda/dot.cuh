// Sums of products of four bytes, one instruction on every architecture.
#pragma once
#include "load.cuh"

// sum + a . b of four unsigned and four signed bytes.
INLINE int dot_unsigned(uint32 a, uint32 b, int sum) {
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}

// The same of signed bytes.
INLINE int dot_signed(uint32 a, uint32 b, int sum) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
}
