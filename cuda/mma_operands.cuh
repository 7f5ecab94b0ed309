// How inline assembly names the operands of a warpgroup MMA: D's registers come first, so the numbers of all others depend
// on how many those are. WGMMA_N8(DEFINE, ...) expands DEFINE(8, the list of D, the next seven operands, ...), and
// WGMMA_D8(constraint) is D itself, an array `d`, for the list of outputs.
#pragma once

#define WGMMA_LIST0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_LIST48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_LIST80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_LIST96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_LIST112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_LIST0_63 WGMMA_LIST0 ", " WGMMA_LIST16 ", " WGMMA_LIST32 ", " WGMMA_LIST48
#define WGMMA_LIST64_127 WGMMA_LIST64 ", " WGMMA_LIST80 ", " WGMMA_LIST96 ", " WGMMA_LIST112

#define WGMMA_N8(DEFINE, ...) DEFINE(8, "%0, %1, %2, %3", "%4", "%5", "%6", "%7", "%8", "%9", "%10", __VA_ARGS__)
#define WGMMA_N16(DEFINE, ...) \
    DEFINE(16, "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", "%11", "%12", "%13", "%14", __VA_ARGS__)
#define WGMMA_N32(DEFINE, ...) DEFINE(32, WGMMA_LIST0, "%16", "%17", "%18", "%19", "%20", "%21", "%22", __VA_ARGS__)
#define WGMMA_N64(DEFINE, ...) \
    DEFINE(64, WGMMA_LIST0 ", " WGMMA_LIST16, "%32", "%33", "%34", "%35", "%36", "%37", "%38", __VA_ARGS__)
#define WGMMA_N96(DEFINE, ...) \
    DEFINE(96, WGMMA_LIST0 ", " WGMMA_LIST16 ", " WGMMA_LIST32, "%48", "%49", "%50", "%51", "%52", "%53", "%54", __VA_ARGS__)
#define WGMMA_N128(DEFINE, ...) DEFINE(128, WGMMA_LIST0_63, "%64", "%65", "%66", "%67", "%68", "%69", "%70", __VA_ARGS__)
#define WGMMA_N256(DEFINE, ...) \
    DEFINE(256, WGMMA_LIST0_63 ", " WGMMA_LIST64_127, "%128", "%129", "%130", "%131", "%132", "%133", "%134", __VA_ARGS__)

#define WGMMA_FOUR(constraint, i) constraint(d[i]), constraint(d[i + 1]), constraint(d[i + 2]), constraint(d[i + 3])
#define WGMMA_SIXTEEN(constraint, i) \
    WGMMA_FOUR(constraint, i), WGMMA_FOUR(constraint, i + 4), WGMMA_FOUR(constraint, i + 8), WGMMA_FOUR(constraint, i + 12)

#define WGMMA_D8(constraint) WGMMA_FOUR(constraint, 0)
#define WGMMA_D16(constraint) WGMMA_FOUR(constraint, 0), WGMMA_FOUR(constraint, 4)
#define WGMMA_D32(constraint) WGMMA_SIXTEEN(constraint, 0)
#define WGMMA_D64(constraint) WGMMA_D32(constraint), WGMMA_SIXTEEN(constraint, 16)
#define WGMMA_D96(constraint) WGMMA_D64(constraint), WGMMA_SIXTEEN(constraint, 32)
#define WGMMA_D128(constraint) WGMMA_D96(constraint), WGMMA_SIXTEEN(constraint, 48)
#define WGMMA_D256(constraint)                                                                                             \
    WGMMA_D128(constraint), WGMMA_SIXTEEN(constraint, 64), WGMMA_SIXTEEN(constraint, 80), WGMMA_SIXTEEN(constraint, 96),   \
        WGMMA_SIXTEEN(constraint, 112)
