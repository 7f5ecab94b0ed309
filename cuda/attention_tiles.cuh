// What a warp does with a chunk of cached tokens and the queries it serves, which are the columns of its MMAs:
//
//   scores   S (tokens x queries) = K Q^T      keys are the rows of A
//   weights  2^(S - reference), lazily rescaled: the reference moves only when a weight would leave fp16's range
//   sums     O (channels x queries) += V^T W^T  values are A again, W^T comes from S by 8x8 transposes
//
// A token's value scale is part of its weight, so that range counts it too.
#pragma once
#include "attention_cache.cuh"

constexpr int query_tiles = QUERY_TILES;  // of 8 columns
constexpr int columns = 8 * query_tiles;  // of a warp
constexpr int channel_pairs = head_dim / 8;  // registers of a fragment's row: four lanes share a row's channels
constexpr int channel_tiles = head_dim / 16;
constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr float nothing = -1e30f, hidden = -2e30f;  // a reference below every score, and a score below every reference
constexpr float highest = 15.0f, aim = 10.0f;  // binary exponents of weights: a maximum beyond `highest` is moved to `aim`

using KeySlice = Slice<4>;
using ValueSlice = Slice<8>;

// ------------------------------------------------------------------------------------------------------- queries

constexpr int query_row_bytes = head_dim * 2;

// What a warp knows of its columns besides the fragments. A token's score is
// key_scale * (sum of products) * slope + key_minimum * offset, in base 2.
struct Line {
    float slope, offsets[query_tiles][2];
};

// Register p of the fragment of one query: the two channels that register p of a key's fragment holds. Codes in odd
// places count more than they are, and meet a query that counts less.
template <class Query> INLINE uint32 query_pair(float& sum, const Query* row, int p) {
    const int c = threadIdx.x % 4, local = p / word_pairs * word_channels + p % word_pairs;
    const float low = to_float(row[KeySlice::channel(c, local)]), high = to_float(row[KeySlice::channel(c, local + word_pairs)]);
    const float place = p % word_pairs % 2 ? odd_place : 1.0f;
    sum += low + high;
    return Operand::of(low * place, high * place);
}

// The fragments of `columns` queries that lie in shared memory, given to keep(t, p, pair), and their line.
template <class Query, class Keep> INLINE Line read_queries(const Query* rows, float scaling, Keep keep) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    Line line;
    line.slope = scaling * code_unit;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t) {
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < channel_pairs; ++p) keep(t, p, query_pair(sum, rows + (t * 8 + g) * head_dim, p));
        sum += __shfl_xor_sync(all_lanes, sum, 1);
        sum += __shfl_xor_sync(all_lanes, sum, 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) line.offsets[t][i] = scaling * __shfl_sync(all_lanes, sum, (2 * c + i) * 4);
    }
    return line;
}

// -------------------------------------------------------------------------------------------------------- attention

// What a warp has seen, for its lane's two columns of each tile: sums are relative to 2^reference.
struct State {
    float reference[query_tiles][2], weight[query_tiles][2], minimum[query_tiles][2];
    float sums[query_tiles][channel_tiles][4];

    INLINE void clear() {
#pragma unroll
        for (int t = 0; t < query_tiles; ++t)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                reference[t][i] = nothing, weight[t][i] = 0.0f, minimum[t][i] = 0.0f;
#pragma unroll
                for (int m = 0; m < channel_tiles; ++m) sums[t][m][i] = sums[t][m][2 + i] = 0.0f;
            }
    }
};

// What the eight lanes that share a column have each counted of it: the weights' sum and the minimums' share.
INLINE float2 column_totals(const State& state, int t, int i) {
    float weight = state.weight[t][i], minimum = state.minimum[t][i];
    for (int distance = 4; distance < 32; distance *= 2) {
        weight += __shfl_xor_sync(all_lanes, weight, distance);
        minimum += __shfl_xor_sync(all_lanes, minimum, distance);
    }
    return {weight, minimum};
}

// A chunk in shared memory: the codes of its keys, of its values, and its numbers.
struct Chunk {
    const uint8 *keys, *values, *numbers;
};

// Row g of a tile is token g / 2 + 4 (g % 2) of its half, so that the tokens of a fragment of values are neighbours.
INLINE int token_of(int tile, int half, int g) { return tile * 16 + half * 8 + g / 2 + g % 2 * 4; }

template <int TILES> using Scores = float[query_tiles][TILES][4];
template <int TILES> using TileNumbers = Numbers[TILES][2];

template <int TILES, class Queries>
INLINE void score(Scores<TILES>& scores, TileNumbers<TILES>& numbers, const Chunk& chunk, const Queries& queries) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32 pairs[2][channel_pairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 words[KeySlice::words];
            KeySlice::load(words, chunk.keys + token_of(tile, half, g) * row_bytes, c);
#pragma unroll
            for (int w = 0; w < KeySlice::words; ++w) unpack_word(&pairs[half][w * word_pairs], words[w]);
            numbers[tile][half] = load_numbers(chunk.numbers + token_of(tile, half, g) * number_bytes);
        }
#pragma unroll
        for (int t = 0; t < query_tiles; ++t) {
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < channel_pairs; j += 2) {
                const uint2 query = queries.fragment(t, j);
                Operand::mma(sums, pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1], query.x, query.y);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Numbers& token = numbers[tile][i / 2];
                scores[t][tile][i] = sums[i] * (token.key_scale * queries.line.slope) + token.key_minimum * queries.line.offsets[t][i % 2];
            }
        }
    }
}

// Moves the references of the columns in which a weight would be too large; rare, for they move far enough.
template <int TILES> INLINE void keep_in_range(State& state, const Scores<TILES>& scores, const TileNumbers<TILES>& numbers) {
    float top[query_tiles][2];
    bool high = false;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t) top[t][0] = top[t][1] = nothing;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            constexpr float smallest = 5.9604645e-8f;  // the smallest fp16 number above zero
            const float exponent = number_bytes ? log2_approximate(fmaxf(numbers[tile][half].value_scale, smallest)) : 0.0f;
#pragma unroll
            for (int t = 0; t < query_tiles; ++t)
#pragma unroll
                for (int i = 0; i < 2; ++i) top[t][i] = fmaxf(top[t][i], scores[t][tile][2 * half + i] + exponent);
        }
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) high |= top[t][i] > state.reference[t][i] + highest;
    if (!__any_sync(all_lanes, high)) return;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            for (int distance = 4; distance < 32; distance *= 2) top[t][i] = fmaxf(top[t][i], __shfl_xor_sync(all_lanes, top[t][i], distance));
            const float old = state.reference[t][i], now = top[t][i] > old + highest ? top[t][i] - aim : old;
            const float factor = exp2_approximate(old - now);
            state.reference[t][i] = now;
            state.weight[t][i] *= factor;
            state.minimum[t][i] *= factor;
#pragma unroll
            for (int m = 0; m < channel_tiles; ++m) state.sums[t][m][i] *= factor, state.sums[t][m][2 + i] *= factor;
        }
}

template <int TILES>
INLINE void add_values(State& state, const Scores<TILES>& scores, const TileNumbers<TILES>& numbers, const Chunk& chunk) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        uint32 weights[query_tiles][2];
#pragma unroll
        for (int t = 0; t < query_tiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float scaled[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float weight = exp2_approximate(scores[t][tile][2 * half + i] - state.reference[t][i]);
                    state.weight[t][i] += weight;
                    state.minimum[t][i] += weight * numbers[tile][half].value_minimum;
                    scaled[i] = weight * numbers[tile][half].value_scale;
                }
                weights[t][half] = transposed(Operand::of(scaled[0], scaled[1]));
            }
        uint32 pairs[2][channel_pairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 low[ValueSlice::words], high[ValueSlice::words];
            const uint8* row = chunk.values + (tile * 16 + half * 8 + c) * row_bytes;
            ValueSlice::load(low, row, g);
            ValueSlice::load(high, row + 4 * row_bytes, g);
#pragma unroll
            for (int w = 0; w < ValueSlice::words; ++w) {
                if (4 * w + 4 <= ValueSlice::bytes) unpack_tokens<false>(&pairs[half][w * word_channels], low[w], high[w]);
                else unpack_tokens<true>(&pairs[half][w * word_channels], low[w], high[w]);
            }
        }
#pragma unroll
        for (int m = 0; m < channel_tiles; ++m)
#pragma unroll
            for (int t = 0; t < query_tiles; ++t)
                Operand::mma(state.sums[t][m], pairs[0][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m], pairs[1][2 * m + 1],
                             weights[t][0], weights[t][1]);
    }
}
