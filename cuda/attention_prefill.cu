// Many queries of each sequence attend to a paged cache, causally. A block serves one KV head and WARPS * columns pairs of a
// token and one of the heads that share the KV head; keys and values come once for all of them through a ring in shared
// memory, still as codes, and each warp unpacks them for its own columns. A tile of tokens that a warp's queries do not
// see is passed over.

#include "attention_bias.cuh"
#include "attention_work.cuh"
#include "chain.cuh"

using Query = QUERY;  // bf16 or fp16

constexpr int warps = WARPS;
constexpr int threads = warps * 32;
constexpr int stages = STAGES;
constexpr int chunk_tokens = CHUNK;
constexpr int step_tokens = 16;  // worked on at a time
constexpr int token_tiles = step_tokens / 16;
constexpr int codes_bytes = chunk_tokens * row_bytes;
constexpr int stage_bytes = 2 * codes_bytes + chunk_tokens * number_bytes;
constexpr int bias_bytes = has_bias ? warps * (part_bytes + turned_bytes) + chunk_tokens * step_bytes : 0;
constexpr int warp_bytes = columns * head_dim * 2;  // queries as fragments, and results on their way out

extern __shared__ __align__(1024) uint8 shared_bytes[];

// What is needed of a column later on: the last token that it sees and its row of the output, -1 without a query.
struct ColumnEnds {
    int last, row;
};

// A warp's queries: few columns as fragments in registers, many in shared memory, in the order in which its lanes read
// them.
constexpr bool in_registers = query_tiles * head_dim <= 256;

struct Queries {
    uint32 pairs[in_registers ? query_tiles : 1][channel_pairs];
    const uint2* fragments;
    Line line;
    const ColumnEnds* ends;

    INLINE uint2 fragment(int t, int j) const {
        if constexpr (in_registers) return make_uint2(pairs[t][j], pairs[t][j + 1]);
        else return fragments[(t * (channel_pairs / 2) + j / 2) * 32 + threadIdx.x % 32];
    }
};

// A warp brings its own columns; those without a query are zero, and see nothing.
INLINE void copy_queries(uint8* rows, ColumnEnds* ends, int heads, const Query* query, int stride, const Columns& all) {
    const int lane = threadIdx.x % 32, first_column = threadIdx.x / 32 * columns;
#pragma unroll
    for (int at = 0; at < columns * query_row_bytes; at += 512) {
        const int column = (at + lane * 16) / query_row_bytes, number = all.query(first_column + column);
        const Query* row = query + static_cast<long long>(all.work.start + max(number, 0)) * stride + all.head(first_column + column) * head_dim;
        copy_async(rows + at + lane * 16, reinterpret_cast<const uint8*>(row) + (at + lane * 16) % query_row_bytes, number >= 0);
    }
    for (int column = lane; column < columns; column += 32) {
        const int number = all.query(first_column + column);
        const int row = (all.work.start + number) * heads + all.head(first_column + column);
        ends[column] = number < 0 ? ColumnEnds{-1, -1} : ColumnEnds{all.work.position(number), row};
    }
    copy_commit();
}

INLINE void load_queries(Queries& queries, uint8* rows, const ColumnEnds* ends, float scaling) {
    const int lane = threadIdx.x % 32;
    uint32 pairs[query_tiles][channel_pairs];
    queries.line = read_queries(reinterpret_cast<const Query*>(rows), scaling, [&](int t, int p, uint32 pair) { pairs[t][p] = pair; });
    queries.ends = ends;
    if constexpr (in_registers) {
#pragma unroll
        for (int t = 0; t < query_tiles; ++t)
#pragma unroll
            for (int p = 0; p < channel_pairs; ++p) queries.pairs[t][p] = pairs[t][p];
    } else {
        __syncwarp();
        uint2* fragments = reinterpret_cast<uint2*>(rows);
#pragma unroll
        for (int t = 0; t < query_tiles; ++t)
#pragma unroll
            for (int j = 0; j < channel_pairs / 2; ++j)
                fragments[(t * (channel_pairs / 2) + j) * 32 + lane] = make_uint2(pairs[t][2 * j], pairs[t][2 * j + 1]);
        queries.fragments = fragments;
        __syncwarp();
    }
}

// The block's first barrier makes it complete.
INLINE Bias load_bias(uint8* shared, const BiasTables& tables, const Query* query, int stride, const Columns& all, float scaling) {
    const int warp = threadIdx.x / 32;
    uint32* steps = reinterpret_cast<uint32*>(shared);
    float2* parts = reinterpret_cast<float2*>(shared + chunk_tokens * step_bytes + warp * (part_bytes + turned_bytes));
    const float power = bias_power(tables.bias);
    fill_steps(steps, chunk_tokens, tables);
#pragma unroll 4
    for (int column = 0; column < columns; ++column) {
        const int number = all.query(warp * columns + column);
        const Query* row = query + static_cast<long long>(all.work.start + max(number, 0)) * stride + all.head(warp * columns + column) * head_dim;
        stage_part(parts + column * angles, row, number >= 0, tables.bias, power);
    }
    __syncwarp();
    return {steps, parts, reinterpret_cast<uint2*>(parts + columns * angles), scaling / power, tables};
}

// All threads of the block bring a chunk; tokens outside of the range become zeros.
INLINE void copy_chunk(uint8* stage, const uint8* pool, const int* pages, long long page_stride, int chunk, const Range& range) {
    const int first_token = chunk * chunk_tokens;
    if (first_token < range.end) {
        constexpr bool in_one_page = page_tokens >= chunk_tokens;
        const uint8* one_page = pool + (in_one_page ? pages[first_token / page_tokens] * page_stride : 0);
        const int first_row = in_one_page ? first_token % page_tokens : 0;
        auto piece = [&](uint8* to, int part_of_page, int bytes_per_token, int at) {
            const int token = at / bytes_per_token, last = (at + 15) / bytes_per_token;
            const bool inside = first_token + last >= range.first && first_token + token < range.end;
            if constexpr (in_one_page) {
                copy_async(to + at, one_page + part_of_page + first_row * bytes_per_token + at, inside);
            } else {
                const uint8* page = pool + (inside ? pages[(first_token + token) / page_tokens] * page_stride : 0);
                copy_async(to + at, page + part_of_page + token % page_tokens * bytes_per_token + at % bytes_per_token, inside);
            }
        };
#pragma unroll
        for (int side = 0; side < 2; ++side)
#pragma unroll
            for (int at = 0; at < codes_bytes; at += threads * 16)
                if (at + threads * 16 <= codes_bytes || at + threadIdx.x * 16 < codes_bytes)
                    piece(stage + side * codes_bytes, side * page_tokens * row_bytes, row_bytes, at + threadIdx.x * 16);
        if constexpr (number_bytes > 0)
            if (threadIdx.x * 16 < chunk_tokens * number_bytes)
                piece(stage + 2 * codes_bytes, 2 * page_tokens * row_bytes, number_bytes, threadIdx.x * 16);
    }
    copy_commit();  // an empty group too: groups are counted
}

// Tokens that a column does not see weigh nothing; numbers of tokens that were not copied are none.
INLINE void hide_unseen(Scores<token_tiles>& scores, TileNumbers<token_tiles>& numbers, const Queries& queries,
                        int first_token, int window, const Range& range) {
    const int g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = first_token + token_of(tile, half, g);
            if (token < range.first || token >= range.end) numbers[tile][half].value_scale = numbers[tile][half].value_minimum = 0.0f;
#pragma unroll
            for (int t = 0; t < query_tiles; ++t)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int last = queries.ends[t * 8 + 2 * c + i].last;
                    if (token > last || token <= last - window) scores[t][tile][2 * half + i] = hidden;
                }
        }
}

// Results go through shared memory, so that a row leaves in whole sectors.
INLINE void store(const State& state, uint8* shared, Query* out, const float* value_bias, const ColumnEnds* ends) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    Query* rows = reinterpret_cast<Query*>(shared);
#pragma unroll
    for (int t = 0; t < query_tiles; ++t)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto [weight, minimum] = column_totals(state, t, i);
            const float share = weight > 0.0f ? 1.0f / weight : 0.0f;
#pragma unroll
            for (int m = 0; m < channel_tiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int channel = ValueSlice::channel(g, 2 * m + half);
                    const float unit = half ? code_unit * odd_place : code_unit;
                    float attended = (state.sums[t][m][2 * half + i] * unit + minimum) * share;
                    if (value_bias && weight > 0.0f) attended += value_bias[channel];
                    rows[(t * 8 + 2 * c + i) * head_dim + channel] = from_float<Query>(attended);
                }
        }
    __syncwarp();
    for (int column = 0; column < columns; ++column) {
        if (ends[column].row < 0) break;
        uint32* to = reinterpret_cast<uint32*>(out + static_cast<long long>(ends[column].row) * head_dim);
        for (int i = lane; i < head_dim / 2; i += 32) to[i] = reinterpret_cast<const uint32*>(rows + column * head_dim)[i];
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
attention_prefill(const Query* query, const uint8* pool, const int* page_table, const int* query_starts, const int* lengths,
                  const float* value_bias, const float* key_bias, const float* cos, const float* sin, int positions, Query* out,
                  int sequences, int heads, int kv_heads, int max_pages, int query_stride, int window, float scaling) {
    const int group = heads / kv_heads, block_queries = warps * columns / group, kv_head = blockIdx.y;
    allow_next_kernel();
    wait_for_previous_kernel();
    // The last queries of a sequence see most: they go first.
    const Work work = find_work(query_starts, lengths, sequences, block_queries, gridDim.x - 1 - blockIdx.x);
    if (work.sequence < 0) return;

    const int warp = threadIdx.x / 32, lowest = work.position(work.first), top = work.position(min(work.first + block_queries, work.queries) - 1);
    const Range range = {max(0, lowest - window + 1), top + 1};
    const int* pages = page_table + static_cast<long long>(work.sequence) * max_pages;
    const long long page_stride = static_cast<long long>(kv_heads) * page_bytes;
    pool += static_cast<long long>(kv_head) * page_bytes;
    constexpr int all_query_bytes = warps * (warp_bytes + columns * sizeof(ColumnEnds));
    uint8* ring = shared_bytes + all_query_bytes + bias_bytes;
    uint8* own = shared_bytes + warp * warp_bytes;
    ColumnEnds* ends = reinterpret_cast<ColumnEnds*>(shared_bytes + warps * warp_bytes) + warp * columns;
    const Columns all = {work, group, block_queries};
    query += kv_head * group * head_dim;
    copy_queries(own, ends, heads, query, query_stride, all);
    int chunk = range.first / chunk_tokens;
#pragma unroll
    for (int stage = 0; stage < stages - 1; ++stage) copy_chunk(ring + stage * stage_bytes, pool, pages, page_stride, chunk + stage, range);

    Bias bias;
    if constexpr (has_bias) {
        const BiasTables tables = {key_bias + kv_head * head_dim, cos, sin, positions};
        bias = load_bias(shared_bytes + all_query_bytes, tables, query, query_stride, all, scaling);
    }
    copy_wait<stages - 1>();
    __syncwarp();
    Queries queries;
    load_queries(queries, own, ends, scaling);
    const int first_place = warp * columns / group, last_place = min((warp * columns + columns - 1) / group, block_queries - 1);
    const int own_lowest = lowest + first_place, own_top = min(lowest + last_place, top);  // positions of the warp's queries

    State state;
    state.clear();
    int stage = 0, free_stage = stages - 1;
#pragma unroll 1
    for (; chunk * chunk_tokens < range.end; ++chunk) {
        copy_wait<stages - 2>();
        __syncthreads();  // the chunk is there for all warps, and none still reads the one before
        copy_chunk(ring + free_stage * stage_bytes, pool, pages, page_stride, chunk + stages - 1, range);
        const uint8* here = ring + stage * stage_bytes;
        if constexpr (has_bias) bias.turn(chunk * chunk_tokens);
#pragma unroll 1
        for (int step = 0; step < chunk_tokens; step += step_tokens) {
            const int first_token = chunk * chunk_tokens + step;
            if (first_token > own_top || first_token + step_tokens - 1 <= own_lowest - window) continue;
            const Chunk tokens = {here + step * row_bytes, here + codes_bytes + step * row_bytes, here + 2 * codes_bytes + step * number_bytes};
            Scores<token_tiles> scores;
            TileNumbers<token_tiles> numbers;
            score<token_tiles>(scores, numbers, tokens, queries);
            if constexpr (has_bias) bias.add<token_tiles>(scores, step);
            if (first_token + step_tokens - 1 > own_lowest || first_token <= own_top - window)
                hide_unseen(scores, numbers, queries, first_token, window, range);
            keep_in_range<token_tiles>(state, scores, numbers);
            add_values<token_tiles>(state, scores, numbers, tokens);
        }
        free_stage = stage;
        stage = stage + 1 == stages ? 0 : stage + 1;
    }
    copy_wait<0>();
    __syncwarp();
    store(state, own, out + kv_head * group * head_dim, value_bias ? value_bias + kv_head * head_dim : nullptr, ends);
}
