// New tokens enter a paged cache: RoPE and Hadamard on queries and keys, quantization by the rules of formats/kv.py and
// kernels/pages.py, bit for bit, and the write into the page. A warp takes VECTORS heads of a token, of queries,
// keys and values in this order: lane l has channels l, l + 32, ... of each.
//
// Arithmetic that decides a code is written with rounding intrinsics: a contraction to FMA would move codes.

#include "attention_cache.cuh"
#include "chain.cuh"
#include "heads.cuh"

using Input = INPUT;  // bf16, fp16 or float
constexpr bool rotates_keys = ROTATE_KEYS, has_hadamard = HADAMARD;
constexpr int warps = WARPS;
constexpr int vectors = VECTORS;
constexpr int values_per_lane = head_dim / 32;
constexpr int half = head_dim / 2;
constexpr unsigned all_lanes = 0xFFFFFFFFu;

using Values = float[values_per_lane];

// RoPE pairs channel i with i + head_dim / 2: another value of the lane, or, where half a head is no multiple of 32
// channels, one of the lane 16 further.
INLINE void rotate(Values& values, const Values& cos, const Values& sin) {
    const int lane = threadIdx.x % 32;
    Values partner;
    if constexpr (half % 32 == 0) {
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k) partner[k] = values[(k + half / 32) % values_per_lane];
    } else {
        Values across;
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k) across[k] = __shfl_xor_sync(all_lanes, values[k], 16);
        constexpr int near = half / 32;
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k)
            partner[k] = lane < 16 ? across[(k + near) % values_per_lane] : across[(k + near + 1) % values_per_lane];
    }
#pragma unroll
    for (int k = 0; k < values_per_lane; ++k) {
        const float own = __fmul_rn(values[k], cos[k]), other = __fmul_rn(partner[k], sin[k]);
        values[k] = k * 32 + lane < half ? __fsub_rn(own, other) : __fadd_rn(own, other);
    }
}

// The codes of a vector, and its scale and minimum as fp16 bits.
struct Encoded {
    uint32 codes[values_per_lane];
    uint16 scale, minimum;
};

INLINE Encoded encode(const Values& values) {
    Encoded encoded;
    float low = values[0], high = values[0];
#pragma unroll
    for (int k = 1; k < values_per_lane; ++k) low = fminf(low, values[k]), high = fmaxf(high, values[k]);
    if constexpr (element != BF16)
        for (int distance = 16; distance; distance /= 2) {
            low = fminf(low, __shfl_xor_sync(all_lanes, low, distance));
            high = fmaxf(high, __shfl_xor_sync(all_lanes, high, distance));
        }
    if constexpr (element == BF16) {
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k) encoded.codes[k] = from_float<bf16>(values[k]).bits;
    } else if constexpr (element == FP8) {
        constexpr float largest = 448.0f, share = static_cast<float>(1.0 / 448.0);
        encoded.scale = float_to_half(__fmul_rn(fmaxf(-low, high), share));
        const float inverse = reciprocal_or_zero(half_to_float(encoded.scale));
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k) {
            const float ratio = __fmul_rn(values[k], inverse);
            encoded.codes[k] = e4m3_code(fminf(fabsf(ratio), largest)) | (__float_as_uint(ratio) >> 31 << 7);
        }
    } else {
        constexpr float levels = element == INT4 ? 15.0f : 255.0f;
        encoded.minimum = float_to_half(low);
        const float minimum = half_to_float(encoded.minimum);
        encoded.scale = float_to_half(__fdiv_rn(__fsub_rn(high, minimum), levels));
        const float inverse = reciprocal_or_zero(half_to_float(encoded.scale));
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k) {
            const float ratio = __fmul_rn(__fsub_rn(values[k], minimum), inverse);
            encoded.codes[k] = __float2int_rn(fminf(fmaxf(ratio, 0.0f), levels));
        }
    }
    return encoded;
}

// Neighbouring lanes put their codes together to words; each of them stores every word_channels-th.
INLINE void store(uint8* page, int offset, bool is_value, const Encoded& encoded) {
    const int lane = threadIdx.x % 32, place = lane % word_channels;
    uint8* row = page + (is_value ? page_tokens + offset : offset) * row_bytes;
#pragma unroll
    for (int k = 0; k < values_per_lane; ++k) {
        uint32 word = encoded.codes[k] << (place * code_bits);
#pragma unroll
        for (int distance = 1; distance < word_channels; distance *= 2) word |= __shfl_xor_sync(all_lanes, word, distance);
        if (place == k % word_channels) *reinterpret_cast<uint32*>(row + (k * 32 + lane - place) * code_bits / 8) = word;
    }
    if constexpr (number_bytes > 0) {
        uint16* numbers = reinterpret_cast<uint16*>(page + 2 * page_tokens * row_bytes + offset * number_bytes) + is_value * (number_bytes / 4);
        if (lane == 0) numbers[0] = encoded.scale;
        if (number_bytes == 8 && lane == 1) numbers[1] = encoded.minimum;
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
append_kv(uint8* pool, const Input* query, const Input* key, const Input* value, const float* cos, const float* sin,
          const long long* slots, Input* rotated, int heads, int kv_heads, int query_stride, int key_stride, int value_stride) {
    allow_next_kernel();
    wait_for_previous_kernel();
    const long long token = blockIdx.x, slot = slots[token];
    const int first = (blockIdx.y * warps + threadIdx.x / 32) * vectors, lane = threadIdx.x % 32, all = heads + 2 * kv_heads;
    if (first >= all) return;
    Values values[vectors], cosine, sine;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int vector = min(first + v, all - 1);
        const Input* from = vector < heads ? query + token * query_stride + vector * head_dim
                            : vector < heads + kv_heads ? key + token * key_stride + (vector - heads) * head_dim
                                                        : value + token * value_stride + (vector - heads - kv_heads) * head_dim;
#pragma unroll
        for (int k = 0; k < values_per_lane; ++k) values[v][k] = to_float(from[k * 32 + lane]);
    }
#pragma unroll
    for (int k = 0; k < values_per_lane; ++k) {
        const int pair = k * 32 + lane < half ? k * 32 + lane : k * 32 + lane - half;
        cosine[k] = cos[token * half + pair];
        sine[k] = sin[token * half + pair];
    }
    uint8* page = pool + slot / page_tokens * kv_heads * page_bytes;
    const int offset = static_cast<int>(slot % page_tokens);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int vector = first + v;
        const bool is_query = vector < heads, is_value = vector >= heads + kv_heads;
        if (vector >= all || (!is_query && slot < 0)) return;
        if (is_query || (rotates_keys && !is_value)) rotate(values[v], cosine, sine);
        if (has_hadamard && !is_value) hadamard<head_dim>(values[v]);
        if (is_query) {
            Input* to = rotated + (token * heads + vector) * head_dim;
#pragma unroll
            for (int k = 0; k < values_per_lane; ++k) to[k * 32 + lane] = from_float<Input>(values[v][k]);
        } else {
            store(page + (vector - heads) % kv_heads * page_bytes, offset, is_value, encode(values[v]));
        }
    }
}
