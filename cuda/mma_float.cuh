// Warp MMAs on 16-bit floats, and the transposing of their fragments.
// Fragments are those of mma_sync.cuh; a register holds two neighbouring k: a[r]: row g + 8 (r % 2), k = 8 (r / 2) + 2 c.
#pragma once
#include "mma_sync.cuh"
#include "pairs.cuh"

// D (16 x 8, fp32) += A (16 x 16) * B (16 x 8). Subnormal fp16 numbers count at their full value.
struct Float16Pairs : Pair<fp16> {
    static INLINE void mma(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

struct Bfloat16Pairs : Pair<bf16> {
    static INLINE void mma(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
};

// An 8x8 matrix of 16-bit elements, two columns of row g in a lane's register, to its transpose.
INLINE uint32 transposed(uint32 matrix) {
    uint32 result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
    return result;
}
