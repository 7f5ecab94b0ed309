// Prefill: which queries a block serves. The queries of each sequence are cut into blocks of so many; a block's rows are
// the heads that share a KV head of its first query, of the second, and so on.
#pragma once
#include "load.cuh"

// Some queries of a sequence: `queries` of them in all, the first of these is the sequence's query number `first`.
struct Work {
    int sequence, first, queries, start, length;

    // The position of the sequence's query number `query`.
    INLINE int position(int query) const { return length - queries + query; }
};

// Work number `index`, where each sequence is cut into blocks of `block_queries`; sequence -1 if there is none.
INLINE Work find_work(const int* starts, const int* lengths, int sequences, int block_queries, int index) {
    constexpr unsigned all_lanes = 0xFFFFFFFFu;
    const int lane = threadIdx.x % 32;
    for (int base = 0; base < sequences; base += 32) {
        const int sequence = base + lane;
        const int queries = sequence < sequences ? starts[sequence + 1] - starts[sequence] : 0;
        const int blocks = (queries + block_queries - 1) / block_queries;
        int until = blocks;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(all_lanes, until, distance);
            if (lane >= distance) until += before;
        }
        int found = index >= until - blocks && index < until ? lane : -1;
        for (int distance = 16; distance; distance /= 2) found = max(found, __shfl_xor_sync(all_lanes, found, distance));
        if (found >= 0) {
            const int before = __shfl_sync(all_lanes, until - blocks, found), all = __shfl_sync(all_lanes, queries, found);
            return {base + found, (index - before) * block_queries, all, starts[base + found], lengths[base + found]};
        }
        index -= __shfl_sync(all_lanes, until, 31);
    }
    return {-1, 0, 0, 0, 0};
}

// The rows of a block: the heads of the first query, those of the second, ...
struct Columns {
    const Work& work;
    int group, block_queries;

    INLINE int head(int column) const { return column % group; }
    // The sequence's query number, or -1 for a column that has none.
    INLINE int query(int column) const {
        const int number = work.first + column / group;
        return number < work.queries && column / group < block_queries ? number : -1;
    }
};

// The tokens [first, end) that somebody in the block sees.
struct Range {
    int first, end;
};
