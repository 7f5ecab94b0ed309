// What a new token's heads go through on their way into a page: RoPE and Hadamard on queries and keys, quantization by the
// rules of formats/kv.py and kernels/pages.py, bit for bit. What Input is and whether there is a HADAMARD, the including file
// says.
//
// head_dim / 16 lanes share a head, lane l has two runs of eight channels: those from 8 l and those from head_dim / 2 + 8 l,
// so that both channels that RoPE pairs are its own, and so are the eight nibbles of a word. Arithmetic that decides a code
// is written with rounding intrinsics: a contraction to FMA would move codes.
#pragma once
#include "attention_cache.cuh"

constexpr int head_lanes = head_dim / 16;
constexpr int heads_of_warp = 32 / head_lanes;
constexpr int half_head = head_dim / 2;
constexpr bool even_lanes = (head_lanes & (head_lanes - 1)) == 0;  // not so for 96 channels: five heads a warp, two lanes idle
constexpr unsigned whole_warp = 0xFFFFFFFFu;

using Runs = float[2][8];

struct alignas(16) Eight {
    Input values[8];
};

// A lane's place among those of its head, and the head's among those of the warp.
struct Place {
    int lane, first, head;  // `first`: the warp's lane that the head begins at

    INLINE Place() : lane(threadIdx.x % 32 % head_lanes), first(threadIdx.x % 32 / head_lanes * head_lanes), head(threadIdx.x % 32 / head_lanes) {}
};

INLINE void load_head(Runs& runs, const Input* from, const Place& place) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Eight eight = *reinterpret_cast<const Eight*>(from + r * half_head + place.lane * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) runs[r][i] = to_float(eight.values[i]);
    }
}

INLINE void store_head(Input* to, const Runs& runs, const Place& place) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        Eight eight;
#pragma unroll
        for (int i = 0; i < 8; ++i) eight.values[i] = from_float<Input>(runs[r][i]);
        *reinterpret_cast<Eight*>(to + r * half_head + place.lane * 8) = eight;
    }
}

// The cosines and sines of a token's position.
INLINE void load_turn(Runs& turn, const float* cos, const float* sin, const Place& place) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>((r ? sin : cos) + place.lane * 8 + i);
            turn[r][i] = four.x, turn[r][i + 1] = four.y, turn[r][i + 2] = four.z, turn[r][i + 3] = four.w;
        }
}

INLINE void rotate(Runs& runs, const Runs& turn) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float low = runs[0][i], high = runs[1][i];
        runs[0][i] = __fsub_rn(__fmul_rn(low, turn[0][i]), __fmul_rn(high, turn[1][i]));
        runs[1][i] = __fadd_rn(__fmul_rn(high, turn[0][i]), __fmul_rn(low, turn[1][i]));
    }
}

INLINE void butterfly(float& low, float& high) {
    const float sum = __fadd_rn(low, high);
    high = __fsub_rn(low, high);
    low = sum;
}

// That of formats/groups.py: blocks of powers of two, largest first, butterflies from distance 1 upwards, the factor last.
// 96 channels are a block of 64 and one of 32.
INLINE void hadamard(Runs& runs, const Place& place) {
    constexpr int block = even_lanes ? head_dim : 64;
    constexpr float factor_32 = 0.17677669529663687f;
    constexpr float factor = block == 64 ? 0.125f : block == 128 ? 0.08838834764831845f : 0.0625f;
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (!(i & distance)) butterfly(runs[0][i], runs[0][i + distance]), butterfly(runs[1][i], runs[1][i + distance]);
#pragma unroll
    for (int step = 1; step < block / 8; step *= 2) {  // run number r of a head meets number r ^ step
        if (step == head_lanes) {
#pragma unroll
            for (int i = 0; i < 8; ++i) butterfly(runs[0][i], runs[1][i]);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float met[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int other = (r * head_lanes + place.lane) ^ step, from = place.first + other % head_lanes;
                if constexpr (even_lanes) {
                    met[r] = __shfl_sync(whole_warp, runs[r][i], from);
                } else {
                    const float first = __shfl_sync(whole_warp, runs[0][i], from & 31), second = __shfl_sync(whole_warp, runs[1][i], from & 31);
                    met[r] = other < head_lanes ? first : second;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int number = r * head_lanes + place.lane;
                if (!even_lanes && number >= 8 && step == 4) continue;  // the block of 32 has four runs
                runs[r][i] = number & step ? __fsub_rn(met[r], runs[r][i]) : __fadd_rn(runs[r][i], met[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) runs[r][i] = __fmul_rn(runs[r][i], even_lanes || r * head_lanes + place.lane < 8 ? factor : factor_32);
}

// The smallest and the largest channel of the head.
INLINE void range_of(float& low, float& high, const Runs& runs, const Place& place) {
    low = high = runs[0][0];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) low = fminf(low, runs[r][i]), high = fmaxf(high, runs[r][i]);
    auto meet = [&](int from) {
        low = fminf(low, __shfl_sync(whole_warp, low, from & 31));
        high = fmaxf(high, __shfl_sync(whole_warp, high, from & 31));
    };
    if constexpr (even_lanes) {
#pragma unroll
        for (int distance = 1; distance < head_lanes; distance *= 2) meet(place.first + (place.lane ^ distance));
    } else {
        meet(place.first + (place.lane + 3) % 6);
        meet(place.first + (place.lane + 1) % 6);
        meet(place.first + (place.lane + 1) % 6);
    }
}

// Codes of a lane's runs, and the head's scale and minimum as fp16 bits.
struct Encoded {
    uint32 codes[2][8];
    uint16 scale, minimum;
};

INLINE Encoded encode(const Runs& runs, const Place& place) {
    Encoded encoded;
    float low, high;
    if constexpr (element != BF16) range_of(low, high, runs, place);
    float minimum = 0.0f, inverse = 1.0f;
    if constexpr (element == FP8) {
        encoded.scale = float_to_half(__fmul_rn(fmaxf(-low, high), static_cast<float>(1.0 / 448.0)));
        inverse = reciprocal_or_zero(half_to_float(encoded.scale));
    } else if constexpr (element != BF16) {
        encoded.minimum = float_to_half(low);
        minimum = half_to_float(encoded.minimum);
        encoded.scale = float_to_half(__fdiv_rn(__fsub_rn(high, minimum), element == INT4 ? 15.0f : 255.0f));
        inverse = reciprocal_or_zero(half_to_float(encoded.scale));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if constexpr (element == BF16) {
                encoded.codes[r][i] = from_float<bf16>(runs[r][i]).bits;
            } else if constexpr (element == FP8) {
                const float ratio = __fmul_rn(runs[r][i], inverse);
                encoded.codes[r][i] = e4m3_code(fminf(fabsf(ratio), 448.0f)) | (__float_as_uint(ratio) >> 31 << 7);
            } else {
                const float ratio = __fmul_rn(__fsub_rn(runs[r][i], minimum), inverse);
                encoded.codes[r][i] = __float2int_rn(fminf(fmaxf(ratio, 0.0f), element == INT4 ? 15.0f : 255.0f));
            }
        }
    return encoded;
}

// A head's way into the cache up to its quantization: RoPE where it `turns`, Hadamard where it `transforms`, without `center`
// where that is not null. Every lane of a warp takes part, whatever its head is.
INLINE void prepare_head(Runs& runs, const Runs& turn, bool turns, bool transforms, const float* center, const Place& place) {
    if (turns) rotate(runs, turn);
    if (HADAMARD) {
        Runs transformed;
#pragma unroll
        for (int i = 0; i < 16; ++i) transformed[i / 8][i % 8] = runs[i / 8][i % 8];
        hadamard(transformed, place);  // by all lanes of the warp, which may hold values too
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (transforms) runs[i / 8][i % 8] = transformed[i / 8][i % 8];
    }
    if (center != nullptr) {
#pragma unroll
        for (int i = 0; i < 16; ++i) runs[i / 8][i % 8] = __fsub_rn(runs[i / 8][i % 8], center[i / 8 * half_head + place.lane * 8 + i % 8]);
    }
}

// A row of codes, and half of a token's numbers.
INLINE void store_row(uint8* codes, uint8* numbers, const Encoded& encoded, const Place& place) {
    struct alignas(code_bits) Packed {
        uint32 words[code_bits / 4];
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        Packed packed = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) packed.words[i / word_channels] |= encoded.codes[r][i] << (i % word_channels * code_bits);
        *reinterpret_cast<Packed*>(codes + (r * head_lanes + place.lane) * code_bits) = packed;
    }
    if (number_bytes == 0 || place.lane != 0) return;
    if (number_bytes == 8) *reinterpret_cast<uint32*>(numbers) = encoded.scale | static_cast<uint32>(encoded.minimum) << 16;
    else *reinterpret_cast<uint16*>(numbers) = encoded.scale;
}

// The key or the value of the token at `offset` of a page.
INLINE void store_in_page(uint8* page, int offset, bool is_value, const Encoded& encoded, const Place& place) {
    store_row(page + (is_value ? page_tokens + offset : offset) * row_bytes,
              page + 2 * page_tokens * row_bytes + offset * number_bytes + is_value * (number_bytes / 2), encoded, place);
}
