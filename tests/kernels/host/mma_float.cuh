// The host's version of cuda/mma_float.cuh.
#pragma once
#include "mma_sync.cuh"
#include "pairs.cuh"

namespace host {

template <class Number> float half_of(uint32 pair, int half) { return to_float(Number{static_cast<unsigned short>(pair >> (16 * half))}); }

template <class Number> void mma_pairs(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    uint32 all_a[4][32], all_b[2][32];
    for (int r = 0; r < 4; ++r) {
        const uint64_t* shared = share(a[r]);
        for (int l = 0; l < 32; ++l) all_a[r][l] = static_cast<uint32>(shared[l]);
    }
    for (int r = 0; r < 2; ++r) {
        const uint64_t* shared = share(b[r]);
        for (int l = 0; l < 32; ++l) all_b[r][l] = static_cast<uint32>(shared[l]);
    }
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
        for (int r = 0; r < 2; ++r)
            for (int part = 0; part < 4; ++part)
                for (int k = 0; k < 2; ++k)
                    d[i] += half_of<Number>(all_a[2 * r + half][row * 4 + part], k) * half_of<Number>(all_b[r][column * 4 + part], k);
    }
}

template <class Number> struct Pairs : Pair<Number> {
    static void mma(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
        mma_pairs<Number>(d, {a0, a1, a2, a3}, {b0, b1});
    }
};

}  // namespace host

using Float16Pairs = host::Pairs<fp16>;
using Bfloat16Pairs = host::Pairs<bf16>;

INLINE uint32 transposed(uint32 matrix) {
    const uint64_t* all = host::share(matrix);
    const int row = host::lane() / 4, column = host::lane() % 4 * 2;
    auto element = [&](int r, int c) { return static_cast<uint32>(all[r * 4 + c / 2] >> (16 * (c % 2)) & 0xFFFF); };
    return element(column, row) | element(column + 1, row) << 16;
}
