// MXFP4 weights and activations on MMAs for e4m3. E2M1 has two bits of significand, so a code times the power of two of its
// group is an e4m3 number as long as the groups' powers lie within a few octaves: activations come that way, weights become
// so here, and one scale per row and one per token are all that is left outside.
#include "mma_e4m3.cuh"
#include "unpack.cuh"
#include "words.cuh"

constexpr int PLANES = 1;
constexpr int SUMMED_BLOCKS = ROW_GROUPS * K_GROUPS <= 2 || STAGE_BLOCKS > K_GROUPS || TOKENS <= 16 ? 2 : 1;  // as registers allow
constexpr int GROUPS = 4;  // of 32 channels
constexpr int CODE_BYTES = BLOCK_ROWS * BLOCK_K / 2, WEIGHT_BYTES = CODE_BYTES + BLOCK_ROWS * GROUPS;
using Sum = float;
using Fragment = WeightFragment;

template <bool add = true, int COUNT> INLINE void mma(float (&d)[COUNT], const uint32 (&a)[4], uint64 b) { mma_e4m3(d, a, b, add); }

// The e4m3 bytes of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 of a group, in units of 2^-6. `powers` holds eight times the
// exponent of each of a row's four groups, at least 8: then no magnitude but zero is below e4m3's normal numbers.
struct Magnitudes {
    uint32 low, high;

    INLINE Magnitudes(uint32 powers, int group)
        : low(0x0C080000 + permute_bytes(powers, 0, group * 0x1110 + 4)), high(0x1C181410 + permute_bytes(powers, 0, group * 0x1111)) {}

    INLINE uint32 operator[](uint32 selector) const { return permute_bytes(low, high, selector); }
};

// `block`: 4096 bytes in thread order, then the powers of 64 rows. The lower half of a word has four magnitudes of row g in its
// nibbles, the upper half those of row g + 8. The nibbles' top bits are the signs: of row g every second one from bit 7
// on, of row g + 8 from bit 3 on.
INLINE void unpack(Fragment& fragment, const uint8* block, int thread) {
    const uint4* packed = reinterpret_cast<const uint4*>(block) + thread;
    const uint4 first = packed[0], second = packed[128];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    const uint32* powers = reinterpret_cast<const uint32*>(block + CODE_BYTES) + thread / 32 * 16 + thread % 32 / 4;
    const uint32 upper_powers = powers[0], lower_powers = powers[8];
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const Magnitudes upper(upper_powers, group), lower(lower_powers, group);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32 word = words[group * 2 + half], magnitudes = word & 0x77777777;
            fragment.step[group][half * 2] = upper[magnitudes] | (word & 0x80808080);
            fragment.step[group][half * 2 + 1] = lower[magnitudes >> 16] | (word << 4 & 0x80808080);
        }
    }
}

#include "gemm_sm90a.cuh"
