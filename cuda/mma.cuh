// Warpgroup matrix instructions of sm_90a: D (64 x N, int32) += A (64 x 32, s8, registers) * B (32 x N, s8, shared memory).
// A thread holds D[row 16 w + g (+ 8)][column 8 j + 2 c (+ 1)] in d[4 j + 2 (row half) + (column parity)].
#pragma once
#include "load.cuh"

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

// The operand lists below are what inline assembly needs: %0 ... for D, then the four registers of A, then the descriptor of B.
#define P0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define P16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define P32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define P48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define P64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define P80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define P96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define P112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)
#define WGMMA_S8(N, LIST, INPUTS, ADD, ...)                                                                               \
    template <bool add = true> INLINE void mma(int(&d)[N / 2], const uint32(&a)[4], uint64 b) {                           \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; "                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" LIST "}, " INPUTS ", add; }"                 \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add));                       \
    }
WGMMA_S8(8, "%0, %1, %2, %3", "{%4, %5, %6, %7}, %8", "%9", D4(0))
WGMMA_S8(16, "%0, %1, %2, %3, %4, %5, %6, %7", "{%8, %9, %10, %11}, %12", "%13", D4(0), D4(4))
WGMMA_S8(32, P0, "{%16, %17, %18, %19}, %20", "%21", D16(0))
WGMMA_S8(64, P0 ", " P16, "{%32, %33, %34, %35}, %36", "%37", D16(0), D16(16))
WGMMA_S8(128, P0 ", " P16 ", " P32 ", " P48, "{%64, %65, %66, %67}, %68", "%69", D64(0))
WGMMA_S8(256, P0 ", " P16 ", " P32 ", " P48 ", " P64 ", " P80 ", " P96 ", " P112, "{%128, %129, %130, %131}, %132", "%133", D64(0), D64(64))
#undef WGMMA_S8
#undef D64
#undef D16
#undef D4
#undef P0
#undef P16
#undef P32
#undef P48
#undef P64
#undef P80
#undef P96
#undef P112
