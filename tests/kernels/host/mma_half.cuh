// The host's version of cuda/mma_half.cuh: operands are read from shared memory as descriptors say, by the canonical
// layouts of the PTX specification (rows of a swizzle's width, atoms of 8 rows), when the instruction is issued.
#pragma once
#include "mma_float.cuh"

namespace host {

struct Operand16 {
    uint32 start, leading, stride, width;  // bytes

    explicit Operand16(uint64 descriptor)
        : start((descriptor & 0x3FFF) * 16), leading((descriptor >> 16 & 0x3FFF) * 16), stride((descriptor >> 32 & 0x3FFF) * 16),
          width(descriptor >> 62 == 1 ? 128 : 64) {}

    // Address bits 4 and up are swizzled by those from 7 up.
    template <class Number> float read(uint32 offset) const {
        const uint32 address = start + offset, swizzled = address ^ (address >> 7 & (width / 16 - 1)) << 4;
        Number number;
        memcpy(&number, shared_bytes + swizzled, 2);
        return to_float(number);
    }

    // Element k of row n; K-major (along rows) or MN-major (rows are summed over).
    template <class Number> float along_row(int n, int k) const { return read<Number>(n % 8 * width + n / 8 * stride + k * 2); }
    template <class Number> float summed_row(int n, int k) const {
        const int block = width / 2;
        return read<Number>(n % block * 2 + n / block * leading + k % 8 * width + k / 8 * stride);
    }
};

INLINE uint64 descriptor(const void* tile, int leading, int stride, int swizzle) {
    return shared_address(tile) >> 4 | uint64(leading / 16) << 16 | uint64(stride / 16) << 32 | (swizzle == 128 ? 1ull : 2ull) << 62;
}

template <class Number> struct Warpgroup {
    template <int COUNT, class ReadB> static void add_products(float (&d)[COUNT], const float (&a)[2][16], int add, ReadB b) {
        for (int j = 0; j < COUNT / 4; ++j)
            for (int k = 0; k < 2; ++k) {
                float column[16];
                for (int e = 0; e < 16; ++e) column[e] = b(j * 8 + lane() % 4 * 2 + k, e);
                for (int i = 0; i < 2; ++i) {
                    float& sum = d[j * 4 + i * 2 + k];
                    if (!add) sum = 0.0f;
                    for (int e = 0; e < 16; ++e) sum += a[i][e] * column[e];
                }
            }
    }

    template <bool SUMMED, int COUNT> static void mma(float (&d)[COUNT], const uint32 (&fragment)[4], uint64 descriptor, int add) {
        const Operand16 operand(descriptor);
        float a[2][16];
        for (int r = 0; r < 4; ++r) {
            const uint64_t* all = share(fragment[r]);
            for (int e = 0; e < 8; ++e) a[r % 2][r / 2 * 8 + e] = half_of<Number>(static_cast<uint32>(all[lane() / 4 * 4 + e / 2]), e % 2);
        }
        add_products(d, a, add, [&](int n, int k) { return SUMMED ? operand.summed_row<Number>(n, k) : operand.along_row<Number>(n, k); });
    }

    template <int COUNT> static void mma(float (&d)[COUNT], uint64 rows, uint64 descriptor, int add) {
        const Operand16 left(rows), right(descriptor);
        float a[2][16];
        for (int i = 0; i < 2; ++i)
            for (int e = 0; e < 16; ++e) a[i][e] = left.along_row<Number>(warp() % 4 * 16 + lane() / 4 + 8 * i, e);
        add_products(d, a, add, [&](int n, int k) { return right.along_row<Number>(n, k); });
    }
};

}  // namespace host

template <int SWIZZLE> INLINE uint64 rows_descriptor(const void* tile) { return host::descriptor(tile, 16, 8 * SWIZZLE, SWIZZLE); }
template <int SWIZZLE, int ROWS> INLINE uint64 columns_descriptor(const void* tile) {
    return host::descriptor(tile, ROWS * SWIZZLE, 8 * SWIZZLE, SWIZZLE);
}

using Float16Warpgroup = host::Warpgroup<fp16>;
using Bfloat16Warpgroup = host::Warpgroup<bf16>;

INLINE void fence_shared_for_mma() {}
INLINE void mma_fence() {}
INLINE void mma_commit() {}
template <int IN_FLIGHT = 0, int COUNT> INLINE void mma_wait_for(float (&)[COUNT]) {}
