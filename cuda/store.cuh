// Getting results out of an SM: 16-bit outputs through shared memory, and partial sums handed from block to block.
#pragma once
#include "load.cuh"
#include "pairs.cuh"

// Transposing stores of 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8.
INLINE void store_matrices(void* row, const uint32 (&matrix)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(shared_address(row)), "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3]) : "memory");
}

INLINE void store_matrices(void* row, const uint32 (&matrix)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                 ::"r"(shared_address(row)), "r"(matrix[0]), "r"(matrix[1]) : "memory");
}

// ---- flags between blocks: what was written before `raise_flag` is visible after `wait_for_flag`

INLINE void raise_flag(int* flag) { asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory"); }

INLINE void wait_for_flag(const int* flag) {
    int raised;
    do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
    while (!raised);
}

// ---- a warp's accumulators as partial sums in shared or global memory, 16 bytes per lane at a time

template <class Number> struct FourOf;
template <> struct FourOf<int> { using Type = int4; };
template <> struct FourOf<float> { using Type = float4; };

template <class Number, int COUNT> INLINE void store_partial(typename FourOf<Number>::Type* partial, const Number (&sum)[COUNT], int lane) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) partial[i * 32 + lane] = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
}

template <class Number, int COUNT> INLINE void add_partial(Number (&sum)[COUNT], const typename FourOf<Number>::Type* partial, int lane) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i) {
        const auto other = partial[i * 32 + lane];
        sum[4 * i] += other.x;
        sum[4 * i + 1] += other.y;
        sum[4 * i + 2] += other.z;
        sum[4 * i + 3] += other.w;
    }
}
