// Warpgroup MMAs of sm_90a on fp16: D (64 x N, fp32) += A (64 x 16, registers) * B (16 x N, shared memory).
// D and the descriptors are those of mma.cuh. Warp w, lane l, g = l / 4, c = l % 4; register r of A holds k = 2 c + 8 (r / 2)
// and the next one of row 16 w + g + 8 (r % 2).
#pragma once
#include "mma.cuh"

#define P0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define P16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define P32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define P48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define P64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define P80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define P96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define P112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)
#define WGMMA_F16(N, LIST, INPUTS, ...)                                                                                   \
    INLINE void mma(float(&d)[N / 2], const uint32(&a)[4], uint64 b) {                                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" LIST "}, " INPUTS ", 1, 1, 1, 0;"          \
                     : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                 \
    }
WGMMA_F16(8, "%0, %1, %2, %3", "{%4, %5, %6, %7}, %8", D4(0))
WGMMA_F16(16, "%0, %1, %2, %3, %4, %5, %6, %7", "{%8, %9, %10, %11}, %12", D4(0), D4(4))
WGMMA_F16(32, P0, "{%16, %17, %18, %19}, %20", D16(0))
WGMMA_F16(64, P0 ", " P16, "{%32, %33, %34, %35}, %36", D16(0), D16(16))
WGMMA_F16(128, P0 ", " P16 ", " P32 ", " P48, "{%64, %65, %66, %67}, %68", D64(0))
WGMMA_F16(256, P0 ", " P16 ", " P32 ", " P48 ", " P64 ", " P80 ", " P96 ", " P112, "{%128, %129, %130, %131}, %132", D64(0), D64(64))
#undef WGMMA_F16
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
