// The host's version of cuda/mma_fp4.cuh.
#pragma once
#include "mma_sync.cuh"
#include "numbers.cuh"

namespace host {

INLINE float e2m1(uint32 word, int index) {
    static const float MAGNITUDES[8] = {0.f, 0.5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f};
    const uint32 code = word >> (4 * index) & 15;
    return code & 8 ? -MAGNITUDES[code & 7] : MAGNITUDES[code];
}

// `groups` scales of 64 channels each side; `value` reads one.
template <class Value> void mma_fp4(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const float (&c)[4], uint32 scale_a,
                                    uint32 scale_b, int groups, Value value) {
    uint32 all_a[4][32], all_b[2][32], scales_a[32], scales_b[32];
    auto gather = [](uint32 mine, uint32* all) {
        const uint64_t* shared = share(mine);
        for (int l = 0; l < 32; ++l) all[l] = static_cast<uint32>(shared[l]);
    };
    for (int r = 0; r < 4; ++r) gather(a[r], all_a[r]);
    gather(b0, all_b[0]);
    gather(b1, all_b[1]);
    gather(scale_a, scales_a);
    gather(scale_b, scales_b);
    float result[4];
    for (int i = 0; i < 4; ++i) {
        const int row = lane() / 4, half = i / 2, column = lane() % 4 * 2 + i % 2;
        result[i] = c[i];
        for (int k = 0; k < 64; ++k) {
            const int r = k / 32, part = k % 32 / 8, group = k * groups / 64;
            const float scale = value(scales_a[row * 4 + half] >> (8 * group) & 255) * value(scales_b[column * 4] >> (8 * group) & 255);
            result[i] += scale * e2m1(all_a[2 * r + half][row * 4 + part], k % 8) * e2m1(all_b[r][column * 4 + part], k % 8);
        }
    }
    for (int i = 0; i < 4; ++i) d[i] = result[i];
}

}  // namespace host

INLINE void mma_nvfp4(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const float (&c)[4], uint32 scale_a, uint32 scale_b) {
    host::mma_fp4(d, a, b0, b1, c, scale_a, scale_b, 4, e4m3_value);
}
INLINE void mma_mxfp4(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const float (&c)[4], uint32 scale_a, uint32 scale_b) {
    host::mma_fp4(d, a, b0, b1, c, scale_a, scale_b, 2, e8m0_value);
}
