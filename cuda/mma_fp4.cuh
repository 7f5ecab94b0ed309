// The block-scaled FP4 MMA of sm_120a: D (16 x 8, fp32) = A (16 x 64, E2M1, scaled) * B (64 x 8, E2M1, scaled) + C.
// Codes lie as in mma_s4, eight to a register. A scale register holds the scales of 64 channels of one row or column,
// the first one lowest: four E4M3 of 16 channels each, or two E8M0 of 32 in its low half. Row g's comes from lane 4 g,
// row g + 8's from lane 4 g + 1, column g's from lane 4 g.
#pragma once
#include "load.cuh"

#define MMA_FP4(NAME, KIND)                                                                                                   \
    INLINE void NAME(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const float (&c)[4], uint32 scale_a, uint32 scale_b) { \
        asm volatile("mma.sync.aligned.m16n8k64.row.col." KIND                                                                \
                     " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}, {%14}, {0, 0}, {%15}, {0, 0};"       \
                     : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                         \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]), \
                       "r"(scale_a), "r"(scale_b));                                                                           \
    }
MMA_FP4(mma_nvfp4, "kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3")
MMA_FP4(mma_mxfp4, "kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0")
#undef MMA_FP4
