// Warpgroup matrix instructions of sm_90a: D (64 x N, int32) += A (64 x 32, s8, registers) * B (32 x N, s8, shared memory).
// A thread holds D[row 16 w + g (+ 8)][column 8 j + 2 c (+ 1)] in d[4 j + 2 (row half) + (column parity)].
#pragma once
#include "load.cuh"
#include "mma_operands.cuh"

// B lies K-major in rows of 128 bytes, 8 rows to an atom of 1024 bytes, 16-byte chunks swizzled by the row (128-byte mode).
INLINE uint64 operand_descriptor(const void* tile) {
    constexpr uint64 LEADING = 1ull << 16, STRIDE = 1024ull / 16 << 32, SWIZZLE_128 = 1ull << 62;
    return (shared_address(tile) & 0x3FFFF) >> 4 | LEADING | STRIDE | SWIZZLE_128;
}
constexpr uint64 DESCRIPTOR_K32 = 32 / 16;           // 32 channels further
constexpr uint64 DESCRIPTOR_ROW = 128 / 16;          // one row of B further; only by whole atoms of 8 rows

INLINE void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int IN_FLIGHT> INLINE void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory"); }

// All batches but the last IN_FLIGHT are done, and with them this accumulator: it is not read before this point.
template <int IN_FLIGHT = 0, int COUNT> INLINE void mma_wait_for(int (&accumulator)[COUNT]) {
    mma_wait<IN_FLIGHT>();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(accumulator[i])::"memory");
}
template <int IN_FLIGHT = 0, int COUNT> INLINE void mma_wait_for(float (&accumulator)[COUNT]) {
    mma_wait<IN_FLIGHT>();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(accumulator[i])::"memory");
}

#define WGMMA_S8(N, D, A0, A1, A2, A3, B, ADD, ...)                                                                          \
    template <bool add = true> INLINE void mma(int(&d)[N / 2], const uint32(&a)[4], uint64 b) {                            \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" D "}, "                                      \
                     "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add; }"                                                     \
                     : WGMMA_D##N("+r") : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add));                   \
    }
WGMMA_N8(WGMMA_S8)
WGMMA_N16(WGMMA_S8)
WGMMA_N32(WGMMA_S8)
WGMMA_N64(WGMMA_S8)
WGMMA_N128(WGMMA_S8)
WGMMA_N256(WGMMA_S8)
#undef WGMMA_S8
