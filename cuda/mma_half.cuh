// Warpgroup MMAs of sm_90a on 16-bit floats: D (64 x N, fp32) = A (64 x 16) * B (16 x N) (+ D if `add`). A comes from
// registers (fragments as in mma_float.cuh, warp w holds rows 16 w ...) or from shared memory, B from shared memory.
//
// A tile in shared memory is cut along its rows' 16-bit elements into blocks of SWIZZLE bytes: block after block, row after
// row, 16-byte pieces swizzled by the row. The same tile serves as rows that are multiplied along their elements (keys:
// N = rows) and as rows that are summed over (values: N = elements).
#pragma once
#include "mma.cuh"

// Rows of which 16 elements are multiplied: elements of one block, from piece 2 i on, are 2 i further.
template <int SWIZZLE> INLINE uint64 rows_descriptor(const void* tile) {
    constexpr uint64 LEADING = 1ull << 16, STRIDE = SWIZZLE / 2ull << 32, MODE = (SWIZZLE == 128 ? 1ull : 2ull) << 62;
    return (shared_address(tile) & 0x3FFFF) >> 4 | LEADING | STRIDE | MODE;
}

// 16 rows that are summed over, all their elements: 16 rows further are SWIZZLE further.
template <int SWIZZLE, int ROWS> INLINE uint64 columns_descriptor(const void* tile) {
    constexpr uint64 LEADING = ROWS * SWIZZLE / 16ull << 16, STRIDE = SWIZZLE / 2ull << 32, MODE = (SWIZZLE == 128 ? 1ull : 2ull) << 62;
    return (shared_address(tile) & 0x3FFFF) >> 4 | LEADING | STRIDE | MODE;
}

// What this thread wrote to shared memory is there for MMAs and bulk copies that start after the next barrier.
INLINE void fence_shared_for_mma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// With A in registers, and B's rows summed over if SUMMED, else multiplied along.
#define WGMMA_REGISTERS(N, D, A0, A1, A2, A3, B, ADD, TRANSPOSED, TYPE)                                                    \
    template <bool SUMMED> static INLINE void mma(float(&d)[N / 2], const uint32(&a)[4], uint64 b, int add) {              \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, "                          \
                     "{" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, " TRANSPOSED "; }"                               \
                     : WGMMA_D##N("+f")                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(SUMMED)));                    \
    }
// With A in shared memory; both are multiplied along their rows.
#define WGMMA_SHARED(N, D, A, B, ADD, _3, _4, _5, _6, TYPE)                                                                \
    static INLINE void mma(float(&d)[N / 2], uint64 a, uint64 b, int add) {                                                \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" D "}, " A ", " B                 \
                     ", add, 1, 1, 0, 0; }"                                                                                \
                     : WGMMA_D##N("+f") : "l"(a), "l"(b), "r"(add));                                                       \
    }
#define WGMMAS(NAME, TYPE)                                                                                                 \
    struct NAME {                                                                                                          \
        WGMMA_N8(WGMMA_REGISTERS, TYPE)                                                                                    \
        WGMMA_N16(WGMMA_REGISTERS, TYPE)                                                                                   \
        WGMMA_N32(WGMMA_REGISTERS, TYPE)                                                                                   \
        WGMMA_N64(WGMMA_REGISTERS, TYPE)                                                                                   \
        WGMMA_N96(WGMMA_REGISTERS, TYPE)                                                                                   \
        WGMMA_N128(WGMMA_REGISTERS, TYPE)                                                                                  \
        WGMMA_N64(WGMMA_SHARED, TYPE)                                                                                      \
        WGMMA_N128(WGMMA_SHARED, TYPE)                                                                                     \
    };
WGMMAS(Float16Warpgroup, "f16")
WGMMAS(Bfloat16Warpgroup, "bf16")
#undef WGMMAS
#undef WGMMA_SHARED
#undef WGMMA_REGISTERS
