// The host's version of cuda/mma_sync.cuh: every lane shows its registers to the warp and computes its own four results.
#pragma once
#include "load.cuh"

INLINE void copy_async(void* destination, const void* source, bool inside = true) {
    if (inside) memcpy(destination, source, 16);
    else memset(destination, 0, 16);
}

INLINE void copy_commit() {}
template <int IN_FLIGHT> INLINE void copy_wait() {}

INLINE void load_matrices(uint32 (&matrix)[4], const void* row) {
    uint64_t rows[32];
    memcpy(rows, host::share(row), sizeof(rows));
    for (int i = 0; i < 4; ++i)
        memcpy(&matrix[i], reinterpret_cast<const char*>(rows[i * 8 + host::lane() / 4]) + host::lane() % 4 * 4, 4);
}

namespace host {

INLINE int element(uint32 word, int index, int bits) { return static_cast<int>(word << (32 - bits - index * bits)) >> (32 - bits); }

// D = A B + C for m16n8 with `bits` bits per element: 32 / bits channels to a register.
INLINE void mma(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4], int bits) {
    uint32 all_a[4][32], all_b[2][32];
    for (int r = 0; r < 4; ++r) {
        const uint64_t* shared = share(a[r]);
        for (int l = 0; l < 32; ++l) all_a[r][l] = static_cast<uint32>(shared[l]);
    }
    for (int r = 0; r < 2; ++r) {
        const uint64_t* shared = share(r ? b1 : b0);
        for (int l = 0; l < 32; ++l) all_b[r][l] = static_cast<uint32>(shared[l]);
    }
    int result[4];
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
        result[i] = c[i];
        for (int r = 0; r < 2; ++r)
            for (int part = 0; part < 4; ++part)
                for (int k = 0; k < 32 / bits; ++k)
                    result[i] += element(all_a[2 * r + half][row * 4 + part], k, bits) * element(all_b[r][column * 4 + part], k, bits);
    }
    for (int i = 0; i < 4; ++i) d[i] = result[i];
}

}  // namespace host

INLINE void mma_s8(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) { host::mma(d, a, b0, b1, c, 8); }
INLINE void mma_s4(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) { host::mma(d, a, b0, b1, c, 4); }
