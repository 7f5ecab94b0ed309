// From packed 4-bit weights and their group scales to the fp16 operand of a warpgroup MMA.
#pragma once
#include "pairs.cuh"
#include "unpack.cuh"

// ELEMENT (INT4, E2M1), GROUP (16 ... 128 channels) and SCALE come from the compiler's command line. A row's scales are
// fp16, powers of two in the byte that is the upper half of an fp16 number (E5M2), E4M3, or integer multipliers plus 128.
enum Element { INT4, E2M1 };
enum Scale { FP16, E5M2, E4M3, MULTIPLIER };
constexpr Element element = ELEMENT;
constexpr Scale scale = SCALE;

// A 64x128 block of weights as one thread of a warpgroup holds it: the A operand of eight m64k16 instructions.
// Warp w, lane l, g = l / 4, c = l % 4; register r of a step holds k = 2 c + 8 (r / 2) and the next one of row 16 w + g + 8 (r % 2).
struct HalfFragment {
    uint32 step[8][4];
};

constexpr int GROUPS = BLOCK_K / GROUP;  // of a block
constexpr int SCALE_BYTES = scale == FP16 ? 2 : 1;
constexpr int PAIR_BYTES = 2 * GROUPS * SCALE_BYTES;  // scales of the two rows that a thread holds
constexpr int CODE_BYTES = BLOCK_ROWS * BLOCK_K / 2;
constexpr int SCALED_BLOCK_BYTES = CODE_BYTES + BLOCK_ROWS / 2 * PAIR_BYTES;

using Halves = Pair<fp16>;

// ---- scales

// Those of a thread's rows g and g + 8, as they are stored: one behind the other, first all of row g.
struct PairScales {
    uint32 words[(PAIR_BYTES + 3) / 4];

    INLINE explicit PairScales(const uint8* source) {
        if constexpr (PAIR_BYTES == 2) {
            words[0] = *reinterpret_cast<const uint16*>(source);
        } else if constexpr (PAIR_BYTES == 4) {
            words[0] = *reinterpret_cast<const uint32*>(source);
        } else if constexpr (PAIR_BYTES == 8) {
            const uint2 two = *reinterpret_cast<const uint2*>(source);
            words[0] = two.x, words[1] = two.y;
        } else {
#pragma unroll
            for (int i = 0; i < PAIR_BYTES / 16; ++i) {
                const uint4 four = reinterpret_cast<const uint4*>(source)[i];
                words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
        }
    }

    // Twice in a register, as fp16.
    INLINE uint32 both(int half, int group) const {
        const int index = half * GROUPS + group;
        if constexpr (scale == FP16) return permute_bytes(words[index / 2], 0, index % 2 ? 0x3232 : 0x1010);
        const uint32 word = words[index / 4], byte = index % 4;
        if constexpr (scale == MULTIPLIER)  // 1024 plus what is stored, minus 1152
            return Halves::add(permute_bytes(word, 0x64, 0x4040 | byte * 0x0101), 0xE480E480);
        const uint32 upper = permute_bytes(word, 0, 0x0404 | byte * 0x1010);
        return scale == E4M3 ? upper >> 1 : upper;  // E4M3's exponent has a bit less: times 2^-8
    }
};

// ---- codes

// Register r of a step from its word: two INT4 codes, nibbles q + 8. Those of row g are in the low nibbles of bytes, those of
// row g + 8 in the high ones: as the last bits of 1024 + (q + 8), or of 1024 + 16 (q + 8).
INLINE uint32 biased_codes(uint32 word, int r) { return masked_onto(word >> r / 2 * 8, r % 2 ? 0x00F000F0 : 0x000F000F, 0x64006400); }

// The same of E2M1 codes, times 2^-14: sign and three bits where fp16 has its sign, the end of its exponent and the first bit
// of its mantissa. A half of the word holds {sign 0, sign 2, sign 3, sign 1, code 0, code 1, code 2, code 3}.
INLINE uint32 e2m1_codes(uint32 word, int r) {
    constexpr uint32 SIGN = 0x80008000, CODE = 0x0E000E00;
    if (r < 2) return word << 3 * r & (SIGN | CODE);
    return masked_onto(word << r - 1, SIGN, word << 3 * r & CODE);
}

// `block`: 4096 bytes of codes in thread order, then scales by pairs of rows. Integer multipliers give exact products in one
// operation; the other scales are rounded into the weight, to fp16's 11 bits.
INLINE void unpack_scaled(HalfFragment& fragment, const uint8* block, int thread) {
    const uint4* packed = reinterpret_cast<const uint4*>(block) + thread;
    const uint4 first = packed[0], second = packed[128];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    const PairScales scales(block + CODE_BYTES + (thread / 32 * 8 + thread % 32 / 4) * PAIR_BYTES);
#pragma unroll
    for (int group = 0; group < GROUPS; ++group) {
        const uint32 upper = scales.both(0, group), lower = scales.both(1, group);
        // Of 1024 + (q + 8) and 1024 + 16 (q + 8): what turns them into q times the scale.
        const uint32 upper_zero = Halves::multiply(upper, 0xE408E408);
        const uint32 lower_16th = Halves::multiply(lower, 0x2C002C00), lower_zero = Halves::multiply(lower, 0xD480D480);
#pragma unroll
        for (int step = group * 8 / GROUPS; step < (group + 1) * 8 / GROUPS; ++step) {
#pragma unroll
            for (int r = 0; r < 4; ++r) {
                if constexpr (element == E2M1) {
                    fragment.step[step][r] = Halves::multiply(e2m1_codes(words[step], r), r % 2 ? lower : upper);
                } else if constexpr (scale == MULTIPLIER) {
                    const uint32 codes = biased_codes(words[step], r);
                    fragment.step[step][r] = r % 2 ? Halves::fma(codes, lower_16th, lower_zero) : Halves::fma(codes, upper, upper_zero);
                } else {
                    const uint32 codes = biased_codes(words[step], r);
                    const uint32 q = r % 2 ? Halves::fma(codes, 0x2C002C00, 0xD480D480) : Halves::add(codes, 0xE408E408);
                    fragment.step[step][r] = Halves::multiply(q, r % 2 ? lower : upper);
                }
            }
        }
    }
}
