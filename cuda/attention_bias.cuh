// Keys that are stored without their projection's bias: what the bias adds to a score, without touching the keys.
//
// The bias b of a key at position j is rotated like the key, R_j b, and a rotated query q meets it as
//   q . R_j b = sum over angles of along * cos(j angle) + across * sin(j angle),
//   along = q1 b1 + q2 b2, across = q2 b1 - q1 b2     (1, 2: the two channels that RoPE pairs),
// which is a product of two vectors of head_dim numbers, one of the query and one of the position. Positions count from the
// first token of a chunk: the query's numbers are turned to it once per chunk, and the cosines and sines of the tokens
// in a chunk are the same for all chunks, a small table of fp16 pairs in shared memory. In the Hadamard basis nothing
// changes but that the query is taken back from it first: the transform is its own inverse.
#pragma once
#include "attention_tiles.cuh"
#include "heads.cuh"

constexpr bool has_bias = KEY_BIAS;
constexpr bool in_hadamard_basis = HADAMARD;
constexpr int angles = head_dim / 2;
constexpr int part_bytes = columns * angles * 8;                        // (along, across) of a set of columns
constexpr int turned_bytes = query_tiles * (channel_pairs / 2) * 32 * 8;  // the same as a warp's fragments, turned to a chunk
constexpr int step_bytes = angles * 4;                                  // cosines and sines of one token

struct BiasTables {
    const float *bias, *cos, *sin;  // of the KV head, and of all positions
    int positions;
};

// The cosines and sines of the first tokens; the tables' own factor, as some families have one, stays with the chunk's.
INLINE void fill_steps(uint32* steps, int tokens, const BiasTables& tables) {
    for (int i = threadIdx.x; i < tokens * angles; i += blockDim.x) {
        const float factor = 1.0f / tables.cos[i % angles];
        const bool exists = i / angles < tables.positions;
        steps[i] = Float16Pairs::of(exists ? tables.cos[i] * factor : 0.0f, exists ? tables.sin[i] * factor : 0.0f);
    }
}

// A power of two that brings the bias's largest channel to between 1 and 2.
INLINE float bias_power(const float* bias) {
    float largest = 0.0f;
    for (int i = threadIdx.x % 32; i < head_dim; i += 32) largest = fmaxf(largest, fabsf(bias[i]));
    for (int distance = 16; distance; distance /= 2) largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, distance));
    const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23), 16), 240);
    return __uint_as_float(static_cast<unsigned>(254 - exponent) << 23);
}

// A warp writes (along, across) of one query.
template <class Query> INLINE void stage_part(float2* part, const Query* query, bool exists, const float* bias, float power) {
    const int lane = threadIdx.x % 32;
    float values[head_dim / 32];
#pragma unroll
    for (int i = 0; i < head_dim / 32; ++i) values[i] = exists ? to_float(query[i * 32 + lane]) : 0.0f;
    if (in_hadamard_basis) hadamard<head_dim>(values);
    float* row = reinterpret_cast<float*>(part);
#pragma unroll
    for (int i = 0; i < head_dim / 32; ++i) row[i * 32 + lane] = values[i];
    __syncwarp();
    float2 results[(angles + 31) / 32];
#pragma unroll
    for (int i = 0; i < (angles + 31) / 32; ++i) {
        const int angle = i * 32 + lane;
        if (angle >= angles) continue;
        const float first = bias[angle] * power, second = bias[angle + angles] * power;
        results[i] = make_float2(row[angle] * first + row[angle + angles] * second, row[angle + angles] * first - row[angle] * second);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < (angles + 31) / 32; ++i)
        if (i * 32 + lane < angles) part[i * 32 + lane] = results[i];
}

// What a warp adds to its scores.
struct Bias {
    const uint32* steps;
    const float2* parts;
    uint2* turned;
    float slope;
    BiasTables tables;

    // Turns the parts of this warp's columns to the position of a chunk's first token. Lanes keep to what is theirs.
    INLINE void turn(int position) const {
        const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
        for (int j = 0; j < channel_pairs / 2; j += 2) {
            const int angle = j * 8 + c * 4;
            const float4 cosine = *reinterpret_cast<const float4*>(tables.cos + static_cast<long long>(position) * angles + angle);
            const float4 sine = *reinterpret_cast<const float4*>(tables.sin + static_cast<long long>(position) * angles + angle);
#pragma unroll
            for (int t = 0; t < query_tiles; ++t) {
                const float4* part = reinterpret_cast<const float4*>(parts + (t * 8 + g) * angles + angle);
                const float4 low = part[0], high = part[1];
                auto turned_pair = [](float along, float across, float cosine, float sine) {
                    return Float16Pairs::of(along * cosine + across * sine, across * cosine - along * sine);
                };
                uint2* to = turned + (t * (channel_pairs / 2) + j) * 32 + lane;
                to[0] = make_uint2(turned_pair(low.x, low.y, cosine.x, sine.x), turned_pair(low.z, low.w, cosine.y, sine.y));
                to[32] = make_uint2(turned_pair(high.x, high.y, cosine.z, sine.z), turned_pair(high.z, high.w, cosine.w, sine.w));
            }
        }
    }

    // `first_row`: the first scored token's place in its chunk.
    template <int TILES> INLINE void add(Scores<TILES>& scores, int first_row) const {
        const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            float sums[query_tiles][4] = {};
#pragma unroll
            for (int j = 0; j < channel_pairs / 2; j += 2) {
                const uint4 low = *reinterpret_cast<const uint4*>(steps + (first_row + token_of(tile, 0, g)) * angles + j * 8 + c * 4);
                const uint4 high = *reinterpret_cast<const uint4*>(steps + (first_row + token_of(tile, 1, g)) * angles + j * 8 + c * 4);
#pragma unroll
                for (int t = 0; t < query_tiles; ++t) {
                    const uint2* at = turned + (t * (channel_pairs / 2) + j) * 32 + lane;
                    Float16Pairs::mma(sums[t], low.x, high.x, low.y, high.y, at[0].x, at[0].y);
                    Float16Pairs::mma(sums[t], low.z, high.z, low.w, high.w, at[32].x, at[32].y);
                }
            }
#pragma unroll
            for (int t = 0; t < query_tiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[t][tile][i] += sums[t][i] * slope;
        }
    }
};
