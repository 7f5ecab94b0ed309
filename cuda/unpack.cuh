// From packed weights to the s8 operand of a warpgroup MMA.
#pragma once
#include "load.cuh"

// A 64x128 block of weights as one thread of a warpgroup holds it: the A operand of four m64k32 instructions.
// Warp w, lane l, g = l / 4, c = l % 4; register r of step s holds four channels at k = 32 s + 16 (r / 2) + 4 c of
// row 16 w + g + 8 (r % 2).
struct WeightFragment {
    uint32 step[4][4];
};

constexpr int BLOCK_ROWS = 64, BLOCK_K = 128;
constexpr int INT4_BLOCK_BYTES = BLOCK_ROWS * BLOCK_K / 2 + BLOCK_ROWS;  // packed weights, then one multiplier byte per row
constexpr int INT8_BLOCK_BYTES = BLOCK_ROWS * BLOCK_K;

// A row's multiplier m in -15..15, stored as |m| and the sign in bit 7. The repacking has multiplied the weights by
// that sign: a nibble u stands for (u - 8) |m| when m >= 0 and for (u - 7) |m| when m < 0.
struct Multiplier {
    uint32 magnitude, offset;  // offset: 128 minus the zero point times |m|, in each of four bytes

    INLINE explicit Multiplier(uint32 stored) {
        magnitude = stored & 15;
        offset = (128 - magnitude * (8 - (stored >> 7))) * 0x01010101;
    }

    // Four nibbles, one per byte, to four s8. No byte overflows: u |m| + offset <= 248; the xor turns excess-128 into s8.
    INLINE uint32 expand(uint32 nibbles) const { return ((nibbles & 0x0F0F0F0F) * magnitude + offset) ^ 0x80808080; }
};

// `block`: 4096 bytes in thread order, then 64 multipliers. The low nibbles of a word belong to row g, the high ones to g + 8.
INLINE void unpack_int4(WeightFragment& fragment, const uint8* block, int thread) {
    const uint4* packed = reinterpret_cast<const uint4*>(block) + thread;
    const uint4 first = packed[0], second = packed[128];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    const uint8* multipliers = block + BLOCK_ROWS * BLOCK_K / 2 + thread / 32 * 16 + thread % 32 / 4;
    const Multiplier upper(multipliers[0]), lower(multipliers[8]);
#pragma unroll
    for (int word = 0; word < 8; ++word) {
        fragment.step[word / 2][word % 2 * 2] = upper.expand(words[word]);
        fragment.step[word / 2][word % 2 * 2 + 1] = lower.expand(words[word] >> 4);
    }
}

// `block`: 8192 bytes, already in register order. Works on shared and on global memory.
INLINE void unpack_int8(WeightFragment& fragment, const uint8* block, int thread) {
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        const uint4 words = reinterpret_cast<const uint4*>(block)[step * 128 + thread];
        fragment.step[step][0] = words.x;
        fragment.step[step][1] = words.y;
        fragment.step[step][2] = words.z;
        fragment.step[step][3] = words.w;
    }
}
