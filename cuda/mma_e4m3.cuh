// Warpgroup MMAs of sm_90a on e4m3: D (64 x N, fp32) = A (64 x 32, registers) * B (32 x N, shared memory) (+ D if `add`).
// Fragments and descriptors are those of mma.cuh. Sums of products of 4-bit codes over 128 channels come out exact:
// the accumulator keeps 14 bits, and no such sum needs more.
#pragma once
#include "mma.cuh"

#define P0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define P16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define P32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define P48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define WGMMA_E4M3(N, LIST, INPUTS, FLAG, ...)                                                                             \
    INLINE void mma_e4m3(float(&d)[N / 2], const uint32(&a)[4], uint64 b, int add) {                                       \
        asm volatile("{ .reg .pred add; setp.ne.b32 add, " FLAG ", 0; "                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" LIST "}, " INPUTS ", add, 1, 1; }"       \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                       \
    }
WGMMA_E4M3(8, "%0, %1, %2, %3", "{%4, %5, %6, %7}, %8", "%9", D4(0))
WGMMA_E4M3(16, "%0, %1, %2, %3, %4, %5, %6, %7", "{%8, %9, %10, %11}, %12", "%13", D4(0), D4(4))
WGMMA_E4M3(32, P0, "{%16, %17, %18, %19}, %20", "%21", D16(0))
WGMMA_E4M3(64, P0 ", " P16, "{%32, %33, %34, %35}, %36", "%37", D16(0), D16(16))
WGMMA_E4M3(128, P0 ", " P16 ", " P32 ", " P48, "{%64, %65, %66, %67}, %68", "%69", D16(0), D16(16), D16(32), D16(48))
#undef WGMMA_E4M3
#undef D16
#undef D4
#undef P0
#undef P16
#undef P32
#undef P48
