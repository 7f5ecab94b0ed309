// Warpgroup MMAs of sm_90a on e4m3: D (64 x N, fp32) = A (64 x 32, registers) * B (32 x N, shared memory) (+ D if `add`).
// Fragments and descriptors are those of mma.cuh. Sums of products of 4-bit codes over 128 channels come out exact:
// the accumulator keeps 14 bits, and no such sum needs more.
#pragma once
#include "mma.cuh"

#define WGMMA_E4M3(N, D, A0, A1, A2, A3, B, ADD, ...)                                                                      \
    INLINE void mma_e4m3(float(&d)[N / 2], const uint32(&a)[4], uint64 b, int add) {                                       \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" D "}, "                                  \
                     "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1; }"                                               \
                     : WGMMA_D##N("+f") : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                   \
    }
WGMMA_N8(WGMMA_E4M3)
WGMMA_N16(WGMMA_E4M3)
WGMMA_N32(WGMMA_E4M3)
WGMMA_N64(WGMMA_E4M3)
WGMMA_N128(WGMMA_E4M3)
#undef WGMMA_E4M3
