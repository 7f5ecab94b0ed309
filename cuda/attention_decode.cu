// One query per sequence attends to a paged cache: the queries that share a KV head are the columns of warp MMAs.
//
// A block works on one KV head (QUERY_TILES * 8 query heads at most) of one sequence, or on one of `splits` parts of its
// tokens. Each warp takes every WARPS-th chunk of tokens through a ring of asynchronous copies that is its own:
//
//   scores   S (tokens x queries) = K Q^T      keys are the rows of A
//   weights  2^(S - reference), lazily rescaled: the reference moves only when a weight would leave fp16's range
//   sums     O (channels x queries) += V^T W^T  values are A again, W^T comes from S by 8x8 transposes
//
// A token's value scale is part of its weight, so that range counts it too. At the end the warps of a block merge, and of
// the blocks that share a sequence the last to arrive merges the others' sums, in their order.

#include "attention_cache.cuh"
#include "chain.cuh"

using Query = QUERY;  // bf16 or fp16

constexpr int query_tiles = QUERY_TILES;
constexpr int columns = 8 * query_tiles;
constexpr int warps = WARPS;
constexpr int stages = STAGES;
constexpr int chunk_tokens = CHUNK;
constexpr int token_tiles = chunk_tokens / 16;
constexpr int pages_of_chunk = chunk_tokens > page_tokens ? chunk_tokens / page_tokens : 1;
constexpr int channel_pairs = head_dim / 8;    // registers of a fragment's row: four lanes share a row's channels
constexpr int channel_tiles = head_dim / 16;
constexpr int codes_bytes = chunk_tokens * row_bytes;
constexpr int stage_bytes = 2 * codes_bytes + chunk_tokens * number_bytes;
constexpr int query_bytes = columns * (head_dim * 2 + 8);
constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr float nothing = -1e30f, hidden = -2e30f;  // a reference below every score, and a score below every reference
constexpr float highest = 15.0f, aim = 10.0f;  // binary exponents of weights: a maximum beyond `highest` is moved to `aim`

extern __shared__ __align__(1024) uint8 shared_bytes[];

using KeySlice = Slice<4>;
using ValueSlice = Slice<8>;

// The tokens that a block reads: all of [first, end) lies in the chunks [first_chunk, last_chunk).
struct Range {
    int first, end, first_chunk, last_chunk, parts;
};

// At least one chunk for each warp, or a block is not worth its merge.
INLINE Range part_of(int length, int window, int part, int splits) {
    const int first = max(0, length - window), begin = first / chunk_tokens, end = (length + chunk_tokens - 1) / chunk_tokens;
    const int share = max((end - begin + splits - 1) / splits, warps);
    const int from = begin + part * share;
    return {first, length, from, min(end, from + share), (end - begin + share - 1) / share};
}

// ------------------------------------------------------------------------------------------------------- queries

// The queries of the block as 16-bit MMA operands, each scaled by a power of two to use fp16's range, with what turns
// sums of codes into base-2 scores: score = key_scale * sum * slope + key_minimum * offset.
struct Queries {
    uint32 fragment[query_tiles][channel_pairs];
    float slope[query_tiles][2], offset[query_tiles][2];
};

INLINE float largest_of_warp(float value) {
    for (int distance = 16; distance; distance /= 2) value = fmaxf(value, __shfl_xor_sync(all_lanes, value, distance));
    return value;
}

INLINE float sum_of_warp(float value) {
    for (int distance = 16; distance; distance /= 2) value += __shfl_xor_sync(all_lanes, value, distance);
    return value;
}

INLINE void load_queries(Queries& queries, const Query* query, int count, float scaling) {
    uint16* rows = reinterpret_cast<uint16*>(shared_bytes);
    float* factors = reinterpret_cast<float*>(shared_bytes + columns * head_dim * 2);
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    for (int column = threadIdx.x / 32; column < columns; column += warps) {
        float values[head_dim / 32], largest = 0.0f, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < head_dim / 32; ++i) {
            values[i] = column < count ? to_float(query[column * head_dim + i * 32 + lane]) : 0.0f;
            largest = fmaxf(largest, fabsf(values[i]));
        }
        const int exponent = max(static_cast<int>(__float_as_uint(largest_of_warp(largest)) >> 23), 16);
        const float power = __uint_as_float(static_cast<unsigned>(254 + 8 - exponent) << 23);  // the largest becomes 2^8 to 2^9
        const float place = lane % 2 ? odd_place : 1.0f;
#pragma unroll
        for (int i = 0; i < head_dim / 32; ++i) {
            const OperandNumber number = from_float<OperandNumber>(values[i] * power * place);
            rows[column * head_dim + i * 32 + lane] = number.bits;
            sum += to_float(number) / place;
        }
        sum = sum_of_warp(sum);
        if (lane == 0) {
            const float slope = scaling / power;
            factors[2 * column] = slope * code_unit;
            factors[2 * column + 1] = slope * sum;
        }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < query_tiles; ++t) {
        const uint16* row = rows + (t * 8 + g) * head_dim;
#pragma unroll
        for (int p = 0; p < channel_pairs; ++p) {
            const int local = p / word_pairs * word_channels + p % word_pairs;
            queries.fragment[t][p] = row[KeySlice::channel(c, local)] | static_cast<uint32>(row[KeySlice::channel(c, local + word_pairs)]) << 16;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            queries.slope[t][i] = factors[2 * (t * 8 + 2 * c + i)];
            queries.offset[t][i] = factors[2 * (t * 8 + 2 * c + i) + 1];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- copies

// Where a warp's chunks lie. Pages are looked up one chunk ahead of the copies, which are stages - 1 chunks ahead of use.
struct Source {
    const uint8* pool;  // of the KV head
    const int* pages;
    long long page_stride;
    Range range;

    INLINE void find(int (&found)[pages_of_chunk], int chunk) const {
#pragma unroll
        for (int i = 0; i < pages_of_chunk; ++i) {
            const int token = chunk * chunk_tokens + i * page_tokens, last = token + min(page_tokens, chunk_tokens);
            const bool needed = chunk < range.last_chunk && token < range.end && last > range.first;
            found[i] = needed ? pages[token / page_tokens] : 0;
        }
    }

    // Tokens outside of the range become zeros: whatever lies there must not reach an MMA.
    INLINE void copy(uint8* stage, const int (&found)[pages_of_chunk], int chunk) const {
        if (chunk < range.last_chunk) {
            const int first_token = chunk * chunk_tokens, lane = threadIdx.x % 32;
            const int row = page_tokens > chunk_tokens ? first_token % page_tokens : 0;
            const uint8* base[pages_of_chunk];
#pragma unroll
            for (int i = 0; i < pages_of_chunk; ++i) base[i] = pool + found[i] * page_stride;
            auto piece = [&](uint8* to, int part_of_page, int bytes_per_token, int at) {
                const int token = at / bytes_per_token, which = pages_of_chunk > 1 ? token / page_tokens : 0;
                const uint8* page = base[0];
#pragma unroll
                for (int i = 1; i < pages_of_chunk; ++i)
                    if (which == i) page = base[i];
                const int last = (at + 15) / bytes_per_token;  // short rows: a piece may hold the numbers of several tokens
                const bool inside = first_token + last >= range.first && first_token + token < range.end;
                copy_async(to + at, page + part_of_page + row * bytes_per_token + at - which * page_tokens * bytes_per_token, inside);
            };
#pragma unroll
            for (int side = 0; side < 2; ++side)
#pragma unroll
                for (int at = 0; at < codes_bytes; at += 512)
                    if (at + 512 <= codes_bytes || at + lane * 16 < codes_bytes)
                        piece(stage + side * codes_bytes, side * page_tokens * row_bytes, row_bytes, at + lane * 16);
            if constexpr (number_bytes > 0)
                if (lane * 16 < chunk_tokens * number_bytes) piece(stage + 2 * codes_bytes, 2 * page_tokens * row_bytes, number_bytes, lane * 16);
        }
        copy_commit();  // an empty group too: groups are counted
    }
};

// -------------------------------------------------------------------------------------------------------- attention

// What a warp has seen, for its lane's two columns of each tile: sums are relative to 2^reference.
struct State {
    float reference[query_tiles][2], weight[query_tiles][2], minimum[query_tiles][2];
    float sums[query_tiles][channel_tiles][4];
};

using Scores = float[query_tiles][token_tiles][4];

// Row g of a tile is token g / 2 + 4 (g % 2) of its half, so that the tokens of a fragment of values are neighbours.
INLINE int token_of(int tile, int half, int g) { return tile * 16 + half * 8 + g / 2 + g % 2 * 4; }

INLINE void score(Scores& scores, Numbers (&numbers)[token_tiles][2], const uint8* stage, const Queries& queries) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
        uint32 pairs[2][channel_pairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 words[KeySlice::words];
            KeySlice::load(words, stage + token_of(tile, half, g) * row_bytes, c);
#pragma unroll
            for (int w = 0; w < KeySlice::words; ++w) unpack_word(&pairs[half][w * word_pairs], words[w]);
            numbers[tile][half] = load_numbers(stage + 2 * codes_bytes + token_of(tile, half, g) * number_bytes);
        }
#pragma unroll
        for (int t = 0; t < query_tiles; ++t) {
            float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
            for (int j = 0; j < channel_pairs; j += 2)
                Operand::mma(sums, pairs[0][j], pairs[1][j], pairs[0][j + 1], pairs[1][j + 1], queries.fragment[t][j], queries.fragment[t][j + 1]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Numbers& token = numbers[tile][i / 2];
                scores[t][tile][i] = token.key_scale * (sums[i] * queries.slope[t][i % 2]) + token.key_minimum * queries.offset[t][i % 2];
            }
        }
    }
}

// Tokens outside of the range weigh nothing, and the numbers that lie in their place are none.
INLINE void hide_outside(Scores& scores, Numbers (&numbers)[token_tiles][2], int first_token, const Range& range) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = first_token + token_of(tile, half, g);
            if (token >= range.first && token < range.end) continue;
            numbers[tile][half].value_scale = numbers[tile][half].value_minimum = 0.0f;
#pragma unroll
            for (int t = 0; t < query_tiles; ++t) scores[t][tile][2 * half] = scores[t][tile][2 * half + 1] = hidden;
        }
}

// Moves the references of the columns in which a weight would be too large; rare, for they move far enough.
INLINE void keep_in_range(State& state, const Scores& scores, const float (&exponents)[token_tiles][2]) {
    float top[query_tiles][2];
    bool high = false;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            top[t][i] = nothing;
#pragma unroll
            for (int tile = 0; tile < token_tiles; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half) top[t][i] = fmaxf(top[t][i], scores[t][tile][2 * half + i] + exponents[tile][half]);
            high |= top[t][i] > state.reference[t][i] + highest;
        }
    if (!__any_sync(all_lanes, high)) return;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            for (int distance = 4; distance < 32; distance *= 2) top[t][i] = fmaxf(top[t][i], __shfl_xor_sync(all_lanes, top[t][i], distance));
            const float old = state.reference[t][i], now = top[t][i] > old + highest ? top[t][i] - aim : old;
            const float factor = exp2_fast(old - now);
            state.reference[t][i] = now;
            state.weight[t][i] *= factor;
            state.minimum[t][i] *= factor;
#pragma unroll
            for (int m = 0; m < channel_tiles; ++m) state.sums[t][m][i] *= factor, state.sums[t][m][2 + i] *= factor;
        }
}

INLINE void attend(State& state, const uint8* stage, const Queries& queries, int first_token, const Range& range) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    Scores scores;
    Numbers numbers[token_tiles][2];
    score(scores, numbers, stage, queries);
    if (first_token < range.first || first_token + chunk_tokens > range.end) hide_outside(scores, numbers, first_token, range);

    float exponents[token_tiles][2];
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            exponents[tile][half] = number_bytes ? log2_fast(fmaxf(numbers[tile][half].value_scale, 5.9604645e-8f)) : 0.0f;
    keep_in_range(state, scores, exponents);

#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
        uint32 weights[query_tiles][2];
#pragma unroll
        for (int t = 0; t < query_tiles; ++t)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float scaled[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float weight = exp2_fast(scores[t][tile][2 * half + i] - state.reference[t][i]);
                    state.weight[t][i] += weight;
                    state.minimum[t][i] += weight * numbers[tile][half].value_minimum;
                    scaled[i] = weight * numbers[tile][half].value_scale;
                }
                weights[t][half] = transposed(Operand::pack(scaled[0], scaled[1]));
            }
        uint32 pairs[2][channel_pairs];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 low[ValueSlice::words], high[ValueSlice::words];
            const uint8* row = stage + codes_bytes + (tile * 16 + half * 8 + c) * row_bytes;
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
                Operand::mma(state.sums[t][m], pairs[0][2 * m], pairs[0][2 * m + 1], pairs[1][2 * m], pairs[1][2 * m + 1], weights[t][0], weights[t][1]);
    }
}

// ----------------------------------------------------------------------------------------------------------- merge

// What is known of one column: the sums of its channels relative to 2^reference, the reference, the weights' sum.
constexpr int record = head_dim + 2;

INLINE void leave(const State& state, float* records, int count) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float weight = state.weight[t][i], minimum = state.minimum[t][i];
            for (int distance = 4; distance < 32; distance *= 2) {
                weight += __shfl_xor_sync(all_lanes, weight, distance);
                minimum += __shfl_xor_sync(all_lanes, minimum, distance);
            }
            const int column = t * 8 + 2 * c + i;
            if (column >= count) continue;
            float* at = records + column * record;
#pragma unroll
            for (int m = 0; m < channel_tiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    at[ValueSlice::channel(g, 2 * m + half)] = state.sums[t][m][2 * half + i] * (half ? code_unit * odd_place : code_unit) + minimum;
            if (g == 0) at[head_dim] = state.reference[t][i], at[head_dim + 1] = weight;
        }
}

struct Merged {
    float sum, reference, weight;
};

// Records of other blocks come from L2: a first-level cache may hold a neighbour's part of what this block wrote.
template <bool GLOBAL> INLINE float read(const float* at) {
    if constexpr (GLOBAL) return __ldcg(at);
    else return *at;
}

// One channel of a column over `parts` blocks' or warps' records.
template <bool GLOBAL> INLINE Merged merge(const float* records, int parts, int column, int channel) {
    constexpr int stride = columns * record;
    const float* at = records + column * record;
    Merged merged = {0.0f, nothing, 0.0f};
    for (int part = 0; part < parts; ++part) merged.reference = fmaxf(merged.reference, read<GLOBAL>(at + part * stride + head_dim));
    for (int part = 0; part < parts; ++part) {
        const float factor = exp2_fast(read<GLOBAL>(at + part * stride + head_dim) - merged.reference);
        merged.sum += factor * read<GLOBAL>(at + part * stride + channel);
        merged.weight += factor * read<GLOBAL>(at + part * stride + head_dim + 1);
    }
    return merged;
}

INLINE void put(Query* out, const float* value_bias, const Merged& merged, int column, int channel) {
    const float attended = merged.sum / merged.weight + (value_bias ? value_bias[channel] : 0.0f);
    out[column * head_dim + channel] = from_float<Query>(attended);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
attention_decode(const Query* query, const uint8* pool, const int* page_table, const int* lengths, const float* value_bias,
                 Query* out, float* partials, int* arrivals, int heads, int kv_heads, int max_pages, int query_stride,
                 int window, float scaling) {
    const int group = heads / kv_heads, tiles = (group + columns - 1) / columns;
    const int kv_head = blockIdx.x / tiles, first_head = kv_head * group + blockIdx.x % tiles * columns;
    const int count = min(columns, (kv_head + 1) * group - first_head), sequence = blockIdx.z;
    allow_next_kernel();
    wait_for_previous_kernel();

    const int length = lengths[sequence];
    const Range range = part_of(length, window, blockIdx.y, gridDim.y);
    out += (static_cast<long long>(sequence) * heads + first_head) * head_dim;
    if (length == 0 && blockIdx.y == 0)
        for (int i = threadIdx.x; i < count * head_dim; i += warps * 32) out[i] = from_float<Query>(0.0f);
    if (static_cast<int>(blockIdx.y) >= range.parts) return;

    const int warp = threadIdx.x / 32;
    uint8* ring = shared_bytes + query_bytes + warp * stages * stage_bytes;
    const Source source = {pool + static_cast<long long>(kv_head) * page_bytes, page_table + static_cast<long long>(sequence) * max_pages,
                           static_cast<long long>(kv_heads) * page_bytes, range};
    int pages[pages_of_chunk], chunk = range.first_chunk + warp;
    source.find(pages, chunk);
#pragma unroll
    for (int stage = 0; stage < stages - 1; ++stage) {
        source.copy(ring + stage * stage_bytes, pages, chunk + stage * warps);
        source.find(pages, chunk + (stage + 1) * warps);
    }
    Queries queries;
    load_queries(queries, query + static_cast<long long>(sequence) * query_stride + first_head * head_dim, count, scaling);

    State state;
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            state.reference[t][i] = nothing, state.weight[t][i] = 0.0f, state.minimum[t][i] = 0.0f;
#pragma unroll
            for (int m = 0; m < channel_tiles; ++m) state.sums[t][m][i] = state.sums[t][m][2 + i] = 0.0f;
        }
    int stage = 0, free_stage = stages - 1;
#pragma unroll 1
    for (; chunk < range.last_chunk; chunk += warps) {
        copy_wait<stages - 2>();
        __syncwarp();  // the chunk is there for all lanes, and none still reads the one before
        source.copy(ring + free_stage * stage_bytes, pages, chunk + (stages - 1) * warps);
        source.find(pages, chunk + stages * warps);
        attend(state, ring + stage * stage_bytes, queries, chunk * chunk_tokens, range);
        free_stage = stage;
        stage = stage + 1 == stages ? 0 : stage + 1;
    }

    copy_wait<0>();
    __syncthreads();
    float* records = reinterpret_cast<float*>(shared_bytes);
    leave(state, records + warp * columns * record, count);
    __syncthreads();
    const float* bias = value_bias ? value_bias + kv_head * head_dim : nullptr;
    if (range.parts == 1) {
        for (int i = threadIdx.x; i < count * head_dim; i += warps * 32)
            put(out, bias, merge<false>(records, warps, i / head_dim, i % head_dim), i / head_dim, i % head_dim);
        return;
    }
    const int place = sequence * gridDim.x + blockIdx.x;
    partials += static_cast<long long>(place) * gridDim.y * columns * record;
    float* mine = partials + blockIdx.y * columns * record;
    for (int i = threadIdx.x; i < count * head_dim; i += warps * 32) {
        const int column = i / head_dim, channel = i % head_dim;
        const Merged merged = merge<false>(records, warps, column, channel);
        mine[column * record + channel] = merged.sum;
        if (channel == 0) mine[column * record + head_dim] = merged.reference, mine[column * record + head_dim + 1] = merged.weight;
    }
    __threadfence();
    __syncthreads();
    int* last = reinterpret_cast<int*>(shared_bytes);
    if (threadIdx.x == 0) {
        *last = atomicAdd(arrivals + place, 1) == range.parts - 1;
        if (*last) arrivals[place] = 0;
    }
    __syncthreads();
    if (!*last) return;
    __threadfence();
    for (int i = threadIdx.x; i < count * head_dim; i += warps * 32)
        put(out, bias, merge<true>(partials, range.parts, i / head_dim, i % head_dim), i / head_dim, i % head_dim);
}
