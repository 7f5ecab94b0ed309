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

#define P0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define P16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define P32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define P48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)

// With A in registers, and B's rows summed over if SUMMED, else multiplied along.
#define WGMMA_REGISTERS(N, TYPE, LIST, INPUTS, ADD, TRANSPOSED, ...)                                                       \
    template <bool SUMMED> static INLINE void mma(float(&d)[N / 2], const uint32(&a)[4], uint64 b, int add) {             \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, " INPUTS               \
                     ", add, 1, 1, " TRANSPOSED "; }"                                                                     \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(SUMMED)));     \
    }
// With A in shared memory; both are multiplied along their rows.
#define WGMMA_SHARED(N, TYPE, LIST, INPUTS, ADD, ...)                                                                      \
    static INLINE void mma(float(&d)[N / 2], uint64 a, uint64 b, int add) {                                               \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" LIST "}, " INPUTS               \
                     ", add, 1, 1, 0, 0; }"                                                                               \
                     : __VA_ARGS__ : "l"(a), "l"(b), "r"(add));                                                           \
    }
#define WGMMAS(NAME, TYPE)                                                                                                 \
    struct NAME {                                                                                                          \
        WGMMA_REGISTERS(8, TYPE, "%0, %1, %2, %3", "{%4, %5, %6, %7}, %8", "%9", "%10", D4(0))                             \
        WGMMA_REGISTERS(16, TYPE, "%0, %1, %2, %3, %4, %5, %6, %7", "{%8, %9, %10, %11}, %12", "%13", "%14", D4(0), D4(4)) \
        WGMMA_REGISTERS(32, TYPE, P0, "{%16, %17, %18, %19}, %20", "%21", "%22", D16(0))                                    \
        WGMMA_REGISTERS(64, TYPE, P0 ", " P16, "{%32, %33, %34, %35}, %36", "%37", "%38", D16(0), D16(16))                 \
        WGMMA_REGISTERS(96, TYPE, P0 ", " P16 ", " P32, "{%48, %49, %50, %51}, %52", "%53", "%54", D16(0), D16(16), D16(32)) \
        WGMMA_REGISTERS(128, TYPE, P0 ", " P16 ", " P32 ", " P48, "{%64, %65, %66, %67}, %68", "%69", "%70", D64(0))       \
        WGMMA_SHARED(64, TYPE, P0 ", " P16, "%32, %33", "%34", D16(0), D16(16))                                            \
        WGMMA_SHARED(128, TYPE, P0 ", " P16 ", " P32 ", " P48, "%64, %65", "%66", D64(0))                                  \
    };
WGMMAS(Float16Warpgroup, "f16")
WGMMAS(Bfloat16Warpgroup, "bf16")
#undef WGMMAS
#undef WGMMA_SHARED
#undef WGMMA_REGISTERS
#undef D64
#undef D16
#undef D4
#undef P0
#undef P16
#undef P32
#undef P48
