// The consumers of prefill attention on sm_90a: a warpgroup has 64 rows of queries and takes the tiles that they see.
//
//   scores   S (64 x TILE) = Q K^T
//   weights  2^(slope S - reference); the reference moves only when a weight would exceed 2^HIGHEST
//   sums     O (64 x head_dim) += W V
//
// A thread holds rows g and g + 8 of its warp's 16; number 4 j + 2 i + k of a fragment is column 8 j + 2 c + k of row i.
#pragma once
#include "attention_prefill_sm90a_tiles.cuh"

constexpr float NOTHING = -1e30f;  // a reference below every score
INLINE float hidden() { return __int_as_float(0xFF800000); }  // minus infinity: a score that weighs nothing
constexpr float HIGHEST = 8.0f;

struct Consumer {
    const Problem& problem;
    const Shared shared;
    const int group, warp, lane, g, c;  // warp: of the consumers
    Stage at;

    using Scores = float[TILE / 2];
    using Weights = uint32[TOKEN_STEPS][4];
    using Sums = float[SUM_PARTS][SUM_CHANNELS / 2];

    struct State {
        float reference[2], weight[2];
    };

    // Of a work item: what this thread's rows are.
    struct Rows {
        int last[2];          // tokens that they see, -1 without a query
        int lowest, highest;  // of the last tokens of all rows of the warpgroup
    };

    INLINE Consumer(const Problem& problem, const Shared& shared, int group)
        : problem(problem), shared(shared), group(group), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(lane / 4), c(lane % 4) {}

    // --------------------------------------------------------------------------------------------- queries

    struct Queries {
        uint32 step[ROOMY ? CHANNEL_STEPS : 1][4];
        uint64 tile;
    };

    INLINE void load_queries(Queries& queries) const {
        const uint8* tile = shared.queries();
        if constexpr (ROOMY) {
#pragma unroll
            for (int step = 0; step < CHANNEL_STEPS; ++step)
#pragma unroll
                for (int r = 0; r < 4; ++r)
                    queries.step[step][r] = *reinterpret_cast<const uint32*>(
                        tile + swizzled_offset<SWIZZLE, ROWS>(warp * 16 + g + r % 2 * 8, step * 2 + r / 2) + c * 4);
        } else {
            queries.tile = rows_descriptor<SWIZZLE>(tile + group * 64 * SWIZZLE);
        }
    }

    // 16 channels further in a tile of rows, in units of a descriptor's address.
    template <int TILE_ROWS> static INLINE int channel_offset(int step) {
        constexpr int BLOCK_STEPS = SWIZZLE / 32;
        return (step / BLOCK_STEPS * TILE_ROWS * SWIZZLE + step % BLOCK_STEPS * 32) / 16;
    }

    // ----------------------------------------------------------------------------------- products of a tile

    INLINE void multiply_keys(Scores& scores, const Queries& queries, int stage) const {
        const uint64 keys = rows_descriptor<SWIZZLE>(shared.tile(KEYS, stage));
        mma_fence();
#pragma unroll
        for (int step = 0; step < CHANNEL_STEPS; ++step) {
            if constexpr (ROOMY)
                Warpgroup::mma<false>(scores, queries.step[step], keys + channel_offset<TILE>(step), step > 0);
            else
                Warpgroup::mma(scores, queries.tile + channel_offset<ROWS>(step), keys + channel_offset<TILE>(step), step > 0);
        }
        mma_commit();
    }

    INLINE void multiply_values(Sums& sums, const Weights& weights, int stage) const {
        const uint64 values = columns_descriptor<SWIZZLE, TILE>(shared.tile(VALUES, stage));
        mma_fence();
#pragma unroll
        for (int step = 0; step < TOKEN_STEPS; ++step)
#pragma unroll
            for (int part = 0; part < SUM_PARTS; ++part)
                Warpgroup::mma<true>(sums[part], weights[step], values + step * SWIZZLE + part * SUM_CHANNELS * 2 / SWIZZLE * TILE * SWIZZLE / 16, 1);
        mma_commit();
    }

    // --------------------------------------------------------------------------------------------- softmax

    INLINE void hide_unseen(Scores& scores, const Rows& rows, int tile) const {
#pragma unroll
        for (int i = 0; i < TILE / 2; ++i) {
            const int token = tile * TILE + i / 4 * 8 + 2 * c + i % 2, last = rows.last[i / 2 % 2];
            if (token > last || token <= last - problem.window) scores[i] = hidden();
        }
    }

    // Turns scores into weights; true if a reference of this warp moved, and by which factors old sums shrink.
    INLINE bool weigh(Scores& scores, State& state, float (&factor)[2]) const {
        float top[2] = {scores[0], scores[2]};
#pragma unroll
        for (int i = 0; i < TILE / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], scores[i]);
        bool moves = false;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 1));
            top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 2)) * problem.slope;
            moves |= top[i] > state.reference[i] + HIGHEST;
        }
        moves = __any_sync(~0u, moves);
        if (moves) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float now = fmaxf(top[i], state.reference[i]);
                factor[i] = exp2_approximate(state.reference[i] - now);
                state.reference[i] = now;
                state.weight[i] *= factor[i];
            }
        }
#pragma unroll
        for (int i = 0; i < TILE / 2; ++i) {
            scores[i] = exp2_approximate(scores[i] * problem.slope - state.reference[i / 2 % 2]);
            state.weight[i / 2 % 2] += scores[i];
        }
        return moves;
    }

    static INLINE void pack(Weights& weights, const Scores& scores) {
#pragma unroll
        for (int step = 0; step < TOKEN_STEPS; ++step)
#pragma unroll
            for (int r = 0; r < 4; ++r) weights[step][r] = Operand::of(scores[step * 8 + r * 2], scores[step * 8 + r * 2 + 1]);
    }

    static INLINE void shrink(Sums& sums, const float (&factor)[2]) {
#pragma unroll
        for (int part = 0; part < SUM_PARTS; ++part)
#pragma unroll
            for (int i = 0; i < SUM_CHANNELS / 2; ++i) sums[part][i] *= factor[i / 2 % 2];
    }

    static INLINE void wait_for_sums(Sums& sums) {
#pragma unroll
        for (int part = 0; part < SUM_PARTS; ++part) mma_wait_for<0>(sums[part]);
    }

    INLINE void release(Side side, int stage) const { Shared::arrive(shared.empty(side, stage)); }

    // Tiles that this warpgroup does not see.
    INLINE void pass(int tiles) {
#pragma unroll 1
        for (; tiles > 0; --tiles, at.advance()) {
            shared.wait_full(KEYS, at);
            release(KEYS, at.stage);
            shared.wait_full(VALUES, at);
            release(VALUES, at.stage);
        }
    }

    INLINE bool partly_hidden(const Rows& rows, int tile) const {
        return tile * TILE + TILE - 1 > rows.lowest || tile * TILE <= rows.highest - problem.window;
    }

    // Scores of the next tile are multiplied while this tile's are turned into weights, if registers hold both.
    INLINE void attend(Sums& sums, State& state, const Queries& queries, const Rows& rows, int tile, int end) {
        if constexpr (ROOMY) attend_overlapped(sums, state, queries, rows, tile, end);
        else attend_in_turn(sums, state, queries, rows, tile, end);
    }

    INLINE void attend_overlapped(Sums& sums, State& state, const Queries& queries, const Rows& rows, int tile, int end) {
        Scores scores;
        Weights weights;
        float factor[2];
        shared.wait_full(KEYS, at);
        multiply_keys(scores, queries, at.stage);
        mma_wait_for<0>(scores);
        release(KEYS, at.stage);
        if (partly_hidden(rows, tile)) hide_unseen(scores, rows, tile);
        weigh(scores, state, factor);  // there are no sums yet
        pack(weights, scores);
#pragma unroll 1
        for (++tile; tile < end; ++tile) {
            Stage next = at;
            next.advance();
            shared.wait_full(KEYS, next);
            multiply_keys(scores, queries, next.stage);
            shared.wait_full(VALUES, at);
            multiply_values(sums, weights, at.stage);
            mma_wait_for<1>(scores);
            release(KEYS, next.stage);
            if (partly_hidden(rows, tile)) hide_unseen(scores, rows, tile);
            const bool moved = weigh(scores, state, factor);
            wait_for_sums(sums);
            release(VALUES, at.stage);
            if (moved) shrink(sums, factor);
            pack(weights, scores);
            at = next;
        }
        shared.wait_full(VALUES, at);
        multiply_values(sums, weights, at.stage);
        wait_for_sums(sums);
        release(VALUES, at.stage);
        at.advance();
    }

    INLINE void attend_in_turn(Sums& sums, State& state, const Queries& queries, const Rows& rows, int tile, int end) {
        Scores scores;
        Weights weights;
        float factor[2];
#pragma unroll 1
        for (; tile < end; ++tile, at.advance()) {
            shared.wait_full(KEYS, at);
            multiply_keys(scores, queries, at.stage);
            mma_wait_for<0>(scores);
            release(KEYS, at.stage);
            if (partly_hidden(rows, tile)) hide_unseen(scores, rows, tile);
            if (weigh(scores, state, factor)) shrink(sums, factor);
            pack(weights, scores);
            shared.wait_full(VALUES, at);
            multiply_values(sums, weights, at.stage);
            wait_for_sums(sums);
            release(VALUES, at.stage);
        }
    }

    // ------------------------------------------------------------------------------------------------ store

    // A row's channels leave 32 at a time, in their own order; what two threads of different rows hold is one piece.
    template <bool BIASED> INLINE void store(const Sums& sums, State& state, const Item& item) const {
        const Columns rows = problem.rows(item.work);
        const float* bias = problem.value_bias + item.kv_head * head_dim;
        float share[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float& weight = state.weight[i];
            weight += __shfl_xor_sync(~0u, weight, 1);
            weight += __shfl_xor_sync(~0u, weight, 2);
            share[i] = weight > 0.0f ? 1.0f / weight : 0.0f;
        }
        Query* to[2];  // of the two rows that this lane stores: eight rows at once, four lanes to each
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = warp * 16 + i * 8 + g, number = rows.query(row);
            const long long place = static_cast<long long>(item.work.start + number) * problem.heads + item.kv_head * rows.group + rows.head(row);
            to[i] = number < 0 ? nullptr : problem.out + place * head_dim + c * 8;
        }
        uint8* staging = shared.store(warp);
#pragma unroll
        for (int first = 0; first < head_dim; first += STORE_CHANNELS) {
#pragma unroll
            for (int j = 0; j < STORE_CHANNELS / 8; ++j)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float pair[2];
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        pair[k] = sums[first / SUM_CHANNELS][(first % SUM_CHANNELS / 8 + j) * 4 + i * 2 + k] * share[i];
                        if (BIASED && share[i] > 0.0f) pair[k] += bias[first + j * 8 + channel_at(2 * c + k)];
                    }
                    *reinterpret_cast<uint32*>(staging + (i * 8 + g) * STORE_PITCH + j * 16 + c * 4) = OutputPairs::of(pair[0], pair[1]);
                }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (to[i])
                    *reinterpret_cast<uint4*>(to[i] + first) = in_order(*reinterpret_cast<const uint4*>(staging + (i * 8 + g) * STORE_PITCH + c * 16));
            __syncwarp();
        }
    }

    // -------------------------------------------------------------------------------------------------- work

    INLINE Rows rows_of(const Work& work) const {
        const Columns all = problem.rows(work);
        Rows rows;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int number = all.query(warp * 16 + g + 8 * i);
            rows.last[i] = number < 0 ? -1 : work.position(number);
        }
        const int first = work.first + group * 64 / all.group, end = min(work.first + all.block_queries, work.queries);
        rows.lowest = work.position(first);
        rows.highest = first < end ? work.position(min(work.first + (group * 64 + 63) / all.group, end - 1)) : -1;
        return rows;
    }

    INLINE void run() {
#pragma unroll 1
        for (uint32 parity = 0;; parity ^= 1) {
            barrier_wait(shared.barrier(Shared::QUERIES_FULL), parity);
            const Item item = shared.queries_item();
            if (item.work.sequence < 0) return;
            uint64& queries_empty = shared.barrier(Shared::QUERIES_EMPTY);
            Queries queries;
            load_queries(queries);
            if (ROOMY) Shared::arrive(queries_empty);

            const Rows rows = rows_of(item.work);
            const Range range = problem.range(item.work);
            const int first = range.first / TILE, end = max(first, (range.end + TILE - 1) / TILE);
            int own_first = max(0, rows.lowest - problem.window + 1) / TILE, own_end = rows.highest / TILE + 1;
            if (rows.highest < 0) own_first = own_end = first;
            Sums sums;
#pragma unroll
            for (int part = 0; part < SUM_PARTS; ++part)
#pragma unroll
                for (int i = 0; i < SUM_CHANNELS / 2; ++i) sums[part][i] = 0.0f;
            State state = {{NOTHING, NOTHING}, {0.0f, 0.0f}};
            pass(own_first - first);
            if (own_first < own_end) attend(sums, state, queries, rows, own_first, own_end);
            pass(end - own_end);
            if (!ROOMY) named_barrier_sync(2 + group, WARPGROUP);  // nobody still multiplies queries
            if (problem.value_bias) store<true>(sums, state, item);
            else store<false>(sums, state, item);
            if (!ROOMY) Shared::arrive(queries_empty);
        }
    }
};
