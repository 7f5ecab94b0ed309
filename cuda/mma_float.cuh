// Warp MMAs on 16-bit floats, and what stands around them in attention: transposing, base-2 exponentials, pairs.
// Fragments are those of mma_sync.cuh; a register holds two neighbouring k: a[r]: row g + 8 (r % 2), k = 8 (r / 2) + 2 c.
#pragma once
#include "mma_sync.cuh"

// D (16 x 8, fp32) += A (16 x 16) * B (16 x 8). Subnormal fp16 numbers count at their full value.
struct Float16Pairs {
    static INLINE void mma(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    static INLINE uint32 pack(float low, float high) {
        uint32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

struct Bfloat16Pairs {
    static INLINE void mma(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    static INLINE uint32 pack(float low, float high) {
        uint32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

// An 8x8 matrix of 16-bit elements, two columns of row g in a lane's register, to its transpose.
INLINE uint32 transposed(uint32 matrix) {
    uint32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}

// (word & mask) | base in one instruction, which the compiler does not find where both are constants.
INLINE uint32 masked_onto(uint32 word, uint32 mask, uint32 base) {
    uint32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(base));
    return result;
}

// a * b + c, and a * b, on pairs of fp16, rounded once.
INLINE uint32 fma_half(uint32 a, uint32 b, uint32 c) {
    uint32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

INLINE uint32 multiply_half(uint32 a, uint32 b) {
    uint32 result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

INLINE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

INLINE float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Four bytes of the eight of `low` and `high`, chosen by the nibbles of `selector`.
INLINE uint32 choose_bytes(uint32 low, uint32 high, uint32 selector) {
    uint32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}
