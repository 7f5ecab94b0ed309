// New tokens enter a paged cache: RoPE and Hadamard on queries and keys, quantization by the rules of formats/kv.py and
// kernels/pages.py, bit for bit, and the write into the page.
//
// head_dim / 16 lanes share a head, lane l has two runs of eight channels: those from 8 l and those from head_dim / 2 + 8 l,
// so that both channels that RoPE pairs are its own, and so are the eight nibbles of a word. A warp takes as many heads of
// a token as it has lanes for, of queries, keys and values in this order. Arithmetic that decides a code is written with
// rounding intrinsics: a contraction to FMA would move codes. `center` (kv_heads, head_dim), in the basis of the cache, is
// what keys are stored without; it may be null.

#include "attention_cache.cuh"
#include "chain.cuh"

using Input = INPUT;  // bf16, fp16 or float
constexpr bool rotates_keys = ROTATE_KEYS, has_hadamard = HADAMARD;
constexpr int warps = WARPS;
constexpr int lanes = head_dim / 16;  // of a head
constexpr int heads_of_warp = 32 / lanes;
constexpr int half = head_dim / 2;
constexpr bool even_lanes = (lanes & (lanes - 1)) == 0;  // not so for 96 channels: five heads a warp, two lanes idle
constexpr unsigned all_lanes = 0xFFFFFFFFu;

using Runs = float[2][8];

struct alignas(16) Eight {
    Input values[8];
};

// A lane's place among those of its head.
struct Place {
    int lane, first;  // `first`: the warp's lane that the head begins at
};

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
        if (step == lanes) {
#pragma unroll
            for (int i = 0; i < 8; ++i) butterfly(runs[0][i], runs[1][i]);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float met[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int other = (r * lanes + place.lane) ^ step, from = place.first + other % lanes;
                if constexpr (even_lanes) {
                    met[r] = __shfl_sync(all_lanes, runs[r][i], from);
                } else {
                    const float first = __shfl_sync(all_lanes, runs[0][i], from & 31), second = __shfl_sync(all_lanes, runs[1][i], from & 31);
                    met[r] = other < lanes ? first : second;
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int number = r * lanes + place.lane;
                if (!even_lanes && number >= 8 && step == 4) continue;  // the block of 32 has four runs
                runs[r][i] = number & step ? __fsub_rn(met[r], runs[r][i]) : __fadd_rn(runs[r][i], met[r]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) runs[r][i] = __fmul_rn(runs[r][i], even_lanes || r * lanes + place.lane < 8 ? factor : factor_32);
}

// The smallest and the largest channel of the head.
INLINE void range_of(float& low, float& high, const Runs& runs, const Place& place) {
    low = high = runs[0][0];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i) low = fminf(low, runs[r][i]), high = fmaxf(high, runs[r][i]);
    auto meet = [&](int from) {
        low = fminf(low, __shfl_sync(all_lanes, low, from & 31));
        high = fmaxf(high, __shfl_sync(all_lanes, high, from & 31));
    };
    if constexpr (even_lanes) {
#pragma unroll
        for (int distance = 1; distance < lanes; distance *= 2) meet(place.first + (place.lane ^ distance));
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

INLINE void store(uint8* page, int offset, bool is_value, const Encoded& encoded, const Place& place) {
    uint8* row = page + (is_value ? page_tokens + offset : offset) * row_bytes;
    struct alignas(code_bits) Packed {
        uint32 words[code_bits / 4];
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        Packed packed = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) packed.words[i / word_channels] |= encoded.codes[r][i] << (i % word_channels * code_bits);
        *reinterpret_cast<Packed*>(row + (r * lanes + place.lane) * code_bits) = packed;
    }
    if (number_bytes == 0 || place.lane != 0) return;
    uint8* numbers = page + 2 * page_tokens * row_bytes + offset * number_bytes + is_value * (number_bytes / 2);
    if (number_bytes == 8) *reinterpret_cast<uint32*>(numbers) = encoded.scale | static_cast<uint32>(encoded.minimum) << 16;
    else *reinterpret_cast<uint16*>(numbers) = encoded.scale;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
append_kv(uint8* pool, const Input* query, const Input* key, const Input* value, const float* cos, const float* sin,
          const float* center, const long long* slots, Input* rotated, int heads, int kv_heads, int query_stride, int key_stride, int value_stride) {
    const Place place = {static_cast<int>(threadIdx.x % 32 % lanes), static_cast<int>(threadIdx.x % 32 / lanes * lanes)};
    const int all = heads + 2 * kv_heads, number = (blockIdx.y * warps + threadIdx.x / 32) * heads_of_warp + threadIdx.x % 32 / lanes;
    const bool exists = number < all && threadIdx.x % 32 < heads_of_warp * lanes;
    const int vector = exists ? number : all - 1;  // lanes without a head of their own stay with the warp
    const bool is_query = vector < heads, is_value = vector >= heads + kv_heads;
    allow_next_kernel();
    wait_for_previous_kernel();

    const long long token = blockIdx.x, slot = slots[token];
    const int head = is_query ? vector : (vector - heads) % kv_heads;
    const Input* heads_of_token = is_query   ? query + token * query_stride
                                  : is_value ? value + token * value_stride
                                             : key + token * key_stride;
    const Input* from = heads_of_token + head * head_dim;
    Runs runs, turn;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Eight eight = *reinterpret_cast<const Eight*>(from + r * half + place.lane * 8);
        const float* table = (r ? sin : cos) + token * half + place.lane * 8;
#pragma unroll
        for (int i = 0; i < 8; ++i) runs[r][i] = to_float(eight.values[i]);
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            const float4 four = *reinterpret_cast<const float4*>(table + i);
            turn[r][i] = four.x, turn[r][i + 1] = four.y, turn[r][i + 2] = four.z, turn[r][i + 3] = four.w;
        }
    }
    if (is_query || (rotates_keys && !is_value)) rotate(runs, turn);
    if (has_hadamard) {
        Runs transformed;
#pragma unroll
        for (int i = 0; i < 16; ++i) transformed[i / 8][i % 8] = runs[i / 8][i % 8];
        hadamard(transformed, place);  // by all lanes of the warp, which may hold values too
#pragma unroll
        for (int i = 0; i < 16; ++i)
            if (!is_value) runs[i / 8][i % 8] = transformed[i / 8][i % 8];
    }
    if (center != nullptr && !is_query && !is_value) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int i = 0; i < 8; ++i)
                runs[r][i] = __fsub_rn(runs[r][i], center[head * head_dim + r * half + place.lane * 8 + i]);
    }
    const Encoded encoded = encode(runs, place);
    if (!exists) return;
    if (is_query) {
        Input* to = rotated + (token * heads + head) * head_dim;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            Eight eight;
#pragma unroll
            for (int i = 0; i < 8; ++i) eight.values[i] = from_float<Input>(runs[r][i]);
            *reinterpret_cast<Eight*>(to + r * half + place.lane * 8) = eight;
        }
    } else if (slot >= 0) {
        store(pool + (slot / page_tokens * kv_heads + head) * page_bytes, static_cast<int>(slot % page_tokens), is_value, encoded, place);
    }
}
