// One query per sequence attends to a paged cache (attention_tiles.cuh). A block works on one KV head, QUERY_TILES * 8 query
// heads that share it at most, of one sequence, or on one of gridDim.y parts of its tokens. Each warp takes every
// WARPS-th chunk of tokens through a ring of asynchronous copies that is its own. At the end the warps of a block merge,
// then the blocks that share a sequence: as a CLUSTER they send each other their sums, through memory the last to arrive
// merges the others', in their order.
//
// SETTLED: lengths and pages were written before the kernel before this one. They are read, and the keys and values that
// the block begins with are fetched into L2, while that one runs.
//
// APPENDS: queries, keys and values come as the projections leave them. Every block prepares its own queries, and the last part
// of a sequence quantizes the newest key and value, stores them and puts them in their place of the chunk they belong to.

#include "attention_bias.cuh"
#include "chain.cuh"
#include "prefetch.cuh"

using Query = QUERY;  // bf16 or fp16
using Input = Query;

#include "append_rows.cuh"

constexpr int warps = WARPS;
constexpr int stages = STAGES;
constexpr bool clustered = CLUSTER > 1;
constexpr bool settled = SETTLED;
constexpr bool appends = APPENDS;
constexpr int chunk_tokens = CHUNK;
constexpr int token_tiles = chunk_tokens / 16;
constexpr int pages_of_chunk = chunk_tokens > page_tokens ? chunk_tokens / page_tokens : 1;
constexpr int codes_bytes = chunk_tokens * row_bytes;
constexpr int stage_bytes = 2 * codes_bytes + chunk_tokens * number_bytes;
constexpr int query_bytes = columns * query_row_bytes;
constexpr int bias_bytes = has_bias ? part_bytes + chunk_tokens * step_bytes + warps * turned_bytes : 0;
constexpr int newest_bytes = appends ? (2 * row_bytes + number_bytes + 127) / 128 * 128 : 0;
static_assert(!(appends && has_bias), "a bias meets queries that lie in memory");

extern __shared__ __align__(1024) uint8 shared_bytes[];

#include "attention_merge.cuh"

// The tokens that a block reads: all of [first, end) lies in the chunks [first_chunk, last_chunk).
struct Range {
    int first, end, first_chunk, last_chunk, parts;
};

// A sequence is cut into `wanted` parts, into more where they would be longer than `longest` chunks, and into fewer where a
// warp would have no chunk: such a part is not worth its merge. gridDim.y parts are enough for any length.
INLINE Range part_of(int length, int window, int part, int wanted, int longest) {
    const int first = max(0, length - window), begin = first / chunk_tokens, end = (length + chunk_tokens - 1) / chunk_tokens;
    const int share = max(min((end - begin + wanted - 1) / wanted, longest), warps);
    const int from = begin + part * share;
    return {first, length, from, min(end, from + share), (end - begin + share - 1) / share};
}

// ------------------------------------------------------------------------------------------------------- queries

struct Queries {
    uint32 pairs[query_tiles][channel_pairs];
    Line line;

    INLINE uint2 fragment(int t, int j) const { return make_uint2(pairs[t][j], pairs[t][j + 1]); }
};

// Columns without a query are zero.
INLINE void copy_queries(const Query* query, int count) {
    for (int at = threadIdx.x * 16; at < columns * query_row_bytes; at += warps * 512) {
        const bool exists = at / query_row_bytes < count;
        copy_async(shared_bytes + at, reinterpret_cast<const uint8*>(query) + (exists ? at : 0), exists);
    }
    copy_commit();
}

// What the projections leave of a token, from the first query head of a block and of its KV head.
struct Projected {
    const Query *query, *key, *value;
    const float *cos, *sin, *center;
};

// Prepares the block's queries and, of the newest token, the key and the value: they go to shared memory, and to `page` if that
// is not null.
INLINE void append(const Projected& from, int count, bool newest, uint8* page, int offset) {
    uint8* row = shared_bytes + query_bytes;
    const Place place;
    for (int at = (count * query_row_bytes + threadIdx.x * 16); at < columns * query_row_bytes; at += warps * 512)
        *reinterpret_cast<uint4*>(shared_bytes + at) = make_uint4(0, 0, 0, 0);  // columns without a query
    const int all = count + (newest ? 2 : 0);
    Runs turn;
    load_turn(turn, from.cos, from.sin, place);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * heads_of_warp; first < all; first += warps * heads_of_warp) {
        const bool exists = first + place.head < all && place.head < heads_of_warp;
        const int vector = exists ? first + place.head : all - 1;
        const bool is_query = vector < count, is_value = vector > count, is_key = vector == count;
        Runs runs;
        load_head(runs, is_query ? from.query + vector * head_dim : is_value ? from.value : from.key, place);
        prepare_head(runs, turn, !is_value, !is_value, is_key ? from.center : nullptr, place);
        const Encoded encoded = encode(runs, place);
        if (!exists) continue;
        if (is_query) {
            store_head(reinterpret_cast<Query*>(shared_bytes) + vector * head_dim, runs, place);
        } else {
            store_row(row + is_value * row_bytes, row + 2 * row_bytes + is_value * (number_bytes / 2), encoded, place);
            if (page) store_in_page(page, offset, is_value, encoded, place);
        }
    }
}

// The newest token's row of a chunk that was copied before it was there.
INLINE void put_newest(uint8* stage, int token) {
    const uint8* row = shared_bytes + query_bytes;
    for (int at = threadIdx.x % 32 * 4; at < 2 * row_bytes + number_bytes; at += 128) {
        uint8* to = at < row_bytes       ? stage + token * row_bytes + at
                    : at < 2 * row_bytes ? stage + codes_bytes + token * row_bytes + at - row_bytes
                                         : stage + 2 * codes_bytes + token * number_bytes + at - 2 * row_bytes;
        *reinterpret_cast<uint32*>(to) = *reinterpret_cast<const uint32*>(row + at);
    }
}

// The barrier after the queries' copies makes it complete.
INLINE Bias load_bias(const BiasTables& tables, const Query* query, int count, float scaling) {
    uint8* shared = shared_bytes + query_bytes;
    float2* parts = reinterpret_cast<float2*>(shared);
    uint32* steps = reinterpret_cast<uint32*>(shared + part_bytes);
    uint8* turned = shared + part_bytes + chunk_tokens * step_bytes + threadIdx.x / 32 * turned_bytes;
    const float power = bias_power(tables.bias);
    fill_steps(steps, chunk_tokens, tables);
    for (int column = threadIdx.x / 32; column < columns; column += warps)
        stage_part(parts + column * angles, query + column * head_dim, column < count, tables.bias, power);
    return {steps, parts, reinterpret_cast<uint2*>(turned), scaling / power, tables};
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

    // Into L2, what the first chunk will be copied from.
    INLINE void fetch(const int (&found)[pages_of_chunk], int chunk) const {
        if (chunk >= range.last_chunk || threadIdx.x % 32 >= pages_of_chunk) return;
        const uint8* page = pool + found[0] * page_stride;
#pragma unroll
        for (int i = 1; i < pages_of_chunk; ++i)
            if (threadIdx.x % 32 == i) page = pool + found[i] * page_stride;
        constexpr int tokens = page_tokens < chunk_tokens ? page_tokens : chunk_tokens;
        const int row = page_tokens > chunk_tokens ? chunk * chunk_tokens % page_tokens : 0;
        prefetch(page + row * row_bytes, tokens * row_bytes);
        prefetch(page + (page_tokens + row) * row_bytes, tokens * row_bytes);
        if (number_bytes > 0) prefetch(page + 2 * page_tokens * row_bytes + row * number_bytes, tokens * number_bytes);
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

// Tokens outside of the range weigh nothing, and the numbers that lie in their place are none.
INLINE void hide_outside(Scores<token_tiles>& scores, TileNumbers<token_tiles>& numbers, int first_token, const Range& range) {
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

INLINE void attend(State& state, const uint8* stage, const Queries& queries, const Bias& bias, int first_token, const Range& range) {
    const Chunk chunk = {stage, stage + codes_bytes, stage + 2 * codes_bytes};
    Scores<token_tiles> scores;
    TileNumbers<token_tiles> numbers;
    score<token_tiles>(scores, numbers, chunk, queries);
    if constexpr (has_bias) {
        bias.turn(first_token);
        bias.add<token_tiles>(scores, 0);
    }
    if (first_token < range.first || first_token + chunk_tokens > range.end) hide_outside(scores, numbers, first_token, range);
    keep_in_range<token_tiles>(state, scores, numbers);
    add_values<token_tiles>(state, scores, numbers, chunk);
}

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTERED
#endif
extern "C" __global__ void CLUSTERED __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
attention_decode(const Query* query, uint8* pool, const int* page_table, const int* lengths, const float* value_bias,
                 const float* key_bias, const float* cos, const float* sin, int positions, Query* out, float* partials,
                 int* arrivals, int heads, int kv_heads, int max_pages, int query_stride,
                 int window, int wanted, int longest, float scaling, const Query* key, const Query* value, const float* center,
                 const long long* slots, int key_stride, int value_stride) {
    const int group = heads / kv_heads, tiles = (group + columns - 1) / columns;
    const int kv_head = blockIdx.x / tiles, first_head = kv_head * group + blockIdx.x % tiles * columns;
    const int count = min(columns, (kv_head + 1) * group - first_head), sequence = blockIdx.z;
    allow_next_kernel();
    if (!settled) wait_for_previous_kernel();

    const int length = lengths[sequence];
    const Range range = part_of(length, window, blockIdx.y, wanted, longest);
    const int warp = threadIdx.x / 32;
    uint8* ring = shared_bytes + query_bytes + bias_bytes + newest_bytes + warp * stages * stage_bytes;
    const Source source = {pool + static_cast<long long>(kv_head) * page_bytes, page_table + static_cast<long long>(sequence) * max_pages,
                           static_cast<long long>(kv_heads) * page_bytes, range};
    int pages[pages_of_chunk], chunk = range.first_chunk + warp;
    source.find(pages, chunk);
    const Inbox inbox = {static_cast<int>(blockIdx.y), range.parts};
    __shared__ unsigned long long landed;
    if (clustered) {
        if (threadIdx.x == 0 && range.parts > 1) expect_bytes(landed, inbox.bytes(count));
        cluster_sync();
    }
    if (settled) {
        source.fetch(pages, chunk);
        wait_for_previous_kernel();
    }

    out += (static_cast<long long>(sequence) * heads + first_head) * head_dim;
    if (length == 0 && blockIdx.y == 0)
        for (int i = threadIdx.x; i < count * head_dim; i += warps * 32) out[i] = from_float<Query>(0.0f);
    if (static_cast<int>(blockIdx.y) >= range.parts) return;

    query += static_cast<long long>(sequence) * query_stride + first_head * head_dim;
    if (!appends) copy_queries(query, count);
#pragma unroll
    for (int stage = 0; stage < stages - 1; ++stage) {
        source.copy(ring + stage * stage_bytes, pages, chunk + stage * warps);
        source.find(pages, chunk + (stage + 1) * warps);
    }
    Bias bias;
    if constexpr (has_bias) bias = load_bias({key_bias + kv_head * head_dim, cos, sin, positions}, query, count, scaling);
    const bool newest = appends && range.last_chunk * chunk_tokens >= length;  // whether this part has the newest token
    if constexpr (appends) {
        const long long slot = slots[sequence];
        const bool stores = newest && blockIdx.x % tiles == 0 && slot >= 0;
        const int turn = sequence * half_head;
        const Projected projected = {query, key + static_cast<long long>(sequence) * key_stride + kv_head * head_dim,
                                     value + static_cast<long long>(sequence) * value_stride + kv_head * head_dim, cos + turn, sin + turn,
                                     center ? center + kv_head * head_dim : nullptr};
        append(projected, count, newest, stores ? pool + (slot / page_tokens * kv_heads + kv_head) * page_bytes : nullptr, slot % page_tokens);
    }
    copy_wait<stages - 1>();
    __syncthreads();
    Queries queries;
    queries.line = read_queries(reinterpret_cast<const Query*>(shared_bytes), scaling,
                                [&](int t, int p, uint32 pair) { queries.pairs[t][p] = pair; });

    State state;
    state.clear();
    int stage = 0, free_stage = stages - 1;
#pragma unroll 1
    for (; chunk < range.last_chunk; chunk += warps) {
        copy_wait<stages - 2>();
        __syncwarp();  // the chunk is there for all lanes, and none still reads the one before
        source.copy(ring + free_stage * stage_bytes, pages, chunk + (stages - 1) * warps);
        source.find(pages, chunk + stages * warps);
        if (newest && chunk == (length - 1) / chunk_tokens) {
            put_newest(ring + stage * stage_bytes, (length - 1) % chunk_tokens);
            __syncwarp();
        }
        attend(state, ring + stage * stage_bytes, queries, bias, chunk * chunk_tokens, range);
        free_stage = stage;
        stage = stage + 1 == stages ? 0 : stage + 1;
    }

    copy_wait<0>();
    __syncthreads();
    float* records = reinterpret_cast<float*>(shared_bytes);
    float* scratch = records + warps * columns * record;
    leave(state, records + warp * columns * record, count);
    __syncthreads();
    const float* added = value_bias ? value_bias + kv_head * head_dim : nullptr;
    if (range.parts == 1) {
        finish<false>(out, added, scratch, records, warps, columns, count);
        return;
    }
    float* factors = scratch + 2 * columns;
    float2* totals = reinterpret_cast<float2*>(scratch);
    weigh<false>(factors, totals, records, warps, columns, count);
    if constexpr (clustered) {
        for (int i = threadIdx.x * 4; i < count * head_dim; i += warps * 128) {
            const int column = i / head_dim, channel = i % head_dim;
            const float4 sum = gather<false>(factors, records, warps, columns, column, channel);
            inbox.give(column, channel, sum.x, sum.y, landed);
            inbox.give(column, channel + 2, sum.z, sum.w, landed);
            if (channel == 0) inbox.give(column, head_dim, totals[column].x, totals[column].y, landed);
        }
        if (inbox.mine(count) <= 0) return;
        wait_for_bytes(landed);
        __syncthreads();  // the factors have been read
        finish<false>(out, added, scratch, inbox.records(), range.parts, inbox.rows(), inbox.mine(count), inbox.part, inbox.parts);
        return;
    }
    const int place = sequence * gridDim.x + blockIdx.x;
    partials += static_cast<long long>(place) * gridDim.y * columns * record;
    float* mine = partials + blockIdx.y * columns * record;
    for (int i = threadIdx.x * 4; i < count * head_dim; i += warps * 128) {
        const int column = i / head_dim, channel = i % head_dim;
        *reinterpret_cast<float4*>(mine + column * record + channel) = gather<false>(factors, records, warps, columns, column, channel);
        if (channel == 0) *reinterpret_cast<float2*>(mine + column * record + head_dim) = totals[column];
    }
    __syncthreads();
    int* last = reinterpret_cast<int*>(shared_bytes);
    if (threadIdx.x == 0) {
        __threadfence();  // one thread's is enough: the barrier has put the others' stores before it
        *last = atomicAdd(arrivals + place, 1) == range.parts - 1;
        __threadfence();
        if (*last) arrivals[place] = 0;
    }
    __syncthreads();
    if (*last) finish<true>(out, added, scratch, partials, range.parts, columns, count);
}
