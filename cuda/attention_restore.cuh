// Codes of a page as the 16-bit numbers they stand for, as prefill on sm_90a multiplies them: two instructions for a pair.
// A word's channels come out in the order of unpack_word; so do the queries', and results are put back in order.
#pragma once
#include "attention_cache.cuh"

constexpr int piece_channels = 8;                                 // in the 16 bytes of a restored piece
constexpr int piece_words = piece_channels * code_bits / 32;      // of codes

// The channel of a piece that stands at `position`.
__device__ constexpr int channel_at(int position) {
    return position / word_channels * word_channels + position % word_channels / 2 + position % 2 * word_pairs;
}

INLINE uint32 low_twice(uint32 pair) { return permute_bytes(pair, pair, 0x1010); }
INLINE uint32 high_twice(uint32 pair) { return permute_bytes(pair, pair, 0x3232); }

// fp16 numbers, each of them twice in a register.
struct Restore {
    uint32 scale, minimum;

    // `numbers`: of one side of a token, and for FP8 of both: the key's low.
    INLINE Restore(uint32 numbers, bool values) {
        if constexpr (element == FP8) scale = Float16Pairs::multiply(values ? high_twice(numbers) : low_twice(numbers), 0x5C005C00u);  // 256: e4m3_to_half
        else scale = low_twice(numbers), minimum = high_twice(numbers);
    }

    // Codes in the low bits of 1024, which count ones there, and in the bits above them: 16 times as much.
    INLINE uint32 low(uint32 word, uint32 mask) const {
        return Float16Pairs::fma(Float16Pairs::fma(masked_onto(word, mask, 0x64006400u), 0x3C003C00u, 0xE400E400u), scale, minimum);
    }
    INLINE uint32 high(uint32 word, uint32 mask) const {
        return Float16Pairs::fma(Float16Pairs::fma(masked_onto(word, mask, 0x64006400u), 0x2C002C00u, 0xD400D400u), scale, minimum);
    }

    // The pairs of a word, as in unpack_word.
    INLINE void word(uint32* pairs, uint32 word) const {
        if constexpr (element == INT4) {
            pairs[0] = low(word, 0x000F000Fu);
            pairs[1] = high(word, 0x00F000F0u);
            pairs[2] = low(word >> 8, 0x000F000Fu);
            pairs[3] = high(word >> 8, 0x00F000F0u);
        } else if constexpr (element == INT8) {
            pairs[0] = low(word, 0x00FF00FFu);
            pairs[1] = low(word >> 8, 0x00FF00FFu);
        } else if constexpr (element == FP8) {
            unpack_word(pairs, word);
            pairs[0] = Float16Pairs::multiply(pairs[0], scale);
            pairs[1] = Float16Pairs::multiply(pairs[1], scale);
        }
    }

    INLINE uint4 piece(const uint32* words) const {
        uint32 pairs[4];
#pragma unroll
        for (int w = 0; w < piece_words; ++w) word(pairs + w * word_pairs, words[w]);
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
};

// A piece whose channels stand as in `channel_at`, in their own order.
INLINE uint4 in_order(const uint4& piece) {
    constexpr uint32 LOW = 0x5410, HIGH = 0x7632;
    if constexpr (element == INT4)
        return make_uint4(permute_bytes(piece.x, piece.y, LOW), permute_bytes(piece.z, piece.w, LOW),
                          permute_bytes(piece.x, piece.y, HIGH), permute_bytes(piece.z, piece.w, HIGH));
    else if constexpr (element == BF16) return piece;
    else
        return make_uint4(permute_bytes(piece.x, piece.y, LOW), permute_bytes(piece.x, piece.y, HIGH),
                          permute_bytes(piece.z, piece.w, LOW), permute_bytes(piece.z, piece.w, HIGH));
}
