// How a page holds keys and values (atomcli/kernels/pages.py), and how warps bring them into MMA fragments.
//
// Codes are multiplied as they are, as 16-bit floats: a nibble or a byte in the low bits of an fp16 is a subnormal number,
// 2^-24 times the code, and a nibble in the bits above is 2^-20 times the code, so unpacking is a mask. The two scales of
// a token are applied to its score and to its weight, not to its channels. MMAs sum over channels in any order, and over
// tokens in any order: fragments take channels and tokens in the order in which wide loads bring them.
#pragma once
#include "mma_float.cuh"
#include "numbers.cuh"

enum Element { INT4, INT8, FP8, BF16 };

constexpr Element element = ELEMENT;
constexpr int head_dim = HEAD_DIM;
constexpr int page_tokens = PAGE;

constexpr int code_bits = element == INT4 ? 4 : element == BF16 ? 16 : 8;
constexpr int row_bytes = head_dim * code_bits / 8;  // codes of one key or value
constexpr int number_bytes = element == BF16 ? 0 : element == FP8 ? 4 : 8;  // fp16 scales and minima of a token
constexpr int page_bytes = page_tokens * (2 * row_bytes + number_bytes);
constexpr int word_channels = 32 / code_bits;
constexpr int word_pairs = word_channels / 2;

template <Element> struct OperandOf { using Type = Float16Pairs; using Number = fp16; };
template <> struct OperandOf<BF16> { using Type = Bfloat16Pairs; using Number = bf16; };
using Operand = OperandOf<element>::Type;
using OperandNumber = OperandOf<element>::Number;

// What a code's value is to the number that the MMA sees. Nibbles in odd places count 16 times as much as in even ones.
constexpr float code_unit = element == BF16 ? 1.0f : element == FP8 ? 256.0f : 16777216.0f;
constexpr float odd_place = element == INT4 ? 0.0625f : 1.0f;

// An E4M3 byte in the high half of each 16-bit half, as fp16 numbers 2^-8 of its value.
INLINE uint32 e4m3_to_half(uint32 bytes) { return (bytes & 0x80008000u) | (bytes >> 1 & 0x3F803F80u); }

// The codes of one word as pairs: pair p holds channels p and p + word_pairs.
INLINE void unpack_word(uint32* pairs, uint32 word) {
    if constexpr (element == INT4) {
        pairs[0] = word & 0x000F000Fu;
        pairs[1] = word & 0x00F000F0u;
        pairs[2] = word >> 8 & 0x000F000Fu;
        pairs[3] = word >> 8 & 0x00F000F0u;
    } else if constexpr (element == INT8) {
        pairs[0] = word & 0x00FF00FFu;
        pairs[1] = word >> 8 & 0x00FF00FFu;
    } else if constexpr (element == FP8) {
        pairs[0] = e4m3_to_half(word << 8);
        pairs[1] = e4m3_to_half(word);
    } else {
        pairs[0] = word;
    }
}

// The same channels of two tokens, low and high, as one pair per channel; a half word has half of them.
template <bool HALF> INLINE void unpack_tokens(uint32* pairs, uint32 low, uint32 high) {
    unpack_word(pairs, permute_bytes(low, high, 0x5410));
    if constexpr (!HALF) unpack_word(pairs + word_pairs, permute_bytes(low, high, 0x7632));
}

// A row of codes shared by LANES lanes: each reads pieces of 16, 8, 4 or 2 bytes, neighbours next to each other.
template <int LANES> struct Slice {
    static constexpr int bytes = row_bytes / LANES;
    static constexpr int words = (bytes + 3) / 4;
    static constexpr int channels = head_dim / LANES;

    static constexpr INLINE int piece(int done) { return bytes - done >= 16 ? 16 : bytes - done >= 8 ? 8 : bytes - done >= 4 ? 4 : 2; }

    template <int DONE = 0> static INLINE void load(uint32* words, const uint8* row, int lane) {
        if constexpr (DONE < bytes) {
            constexpr int size = piece(DONE);
            const uint8* from = row + DONE * LANES + lane * size;
            if constexpr (size == 16) {
                const uint4 four = *reinterpret_cast<const uint4*>(from);
                words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
            } else if constexpr (size == 8) {
                const uint2 two = *reinterpret_cast<const uint2*>(from);
                words[0] = two.x, words[1] = two.y;
            } else if constexpr (size == 4) {
                words[0] = *reinterpret_cast<const uint32*>(from);
            } else {
                words[0] = *reinterpret_cast<const uint16*>(from);
            }
            load<DONE + size>(words + size / 4, row, lane);
        }
    }

    // Which channel of the row a lane's channel `local` is.
    template <int DONE = 0> static INLINE int channel(int lane, int local) {
        constexpr int size = piece(DONE), here = size * 8 / code_bits;
        if constexpr (DONE + size < bytes)
            if (local >= here) return channel<DONE + size>(lane, local - here);
        return (DONE * LANES + lane * size) * 8 / code_bits + local;
    }
};

// A token's numbers: keys are scale * code + minimum, and so are values.
struct Numbers {
    float key_scale, key_minimum, value_scale, value_minimum;
};

INLINE Numbers load_numbers(const uint8* at) {
    Numbers numbers = {1.0f, 0.0f, 1.0f, 0.0f};
    if constexpr (element == FP8) {
        const uint32 both = *reinterpret_cast<const uint32*>(at);
        numbers.key_scale = half_to_float(both & 0xFFFF);
        numbers.value_scale = half_to_float(both >> 16);
    } else if constexpr (element != BF16) {
        const uint2 both = *reinterpret_cast<const uint2*>(at);
        numbers.key_scale = half_to_float(both.x & 0xFFFF);
        numbers.key_minimum = half_to_float(both.x >> 16);
        numbers.value_scale = half_to_float(both.y & 0xFFFF);
        numbers.value_minimum = half_to_float(both.y >> 16);
    }
    return numbers;
}
