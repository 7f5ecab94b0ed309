// The producers of the GEMM on sm_90a: two threads that fill the ring.
#pragma once
#include "gemm_sm90a_tiles.cuh"

// The stages a block fills, in order: the body blocks of its segments, then for each tile that it finishes a stage with
// the outliers' weights (at the stage's start), if there are any, and the finishing stage. Two threads in different
// warps walk it, one for what belongs to the weights and one for what comes from the previous kernel, since a single
// one can't issue copies fast enough. For the same reason a stage must cost few instructions: divisions and products
// are left to the change of segments.
struct Walk {
    const Problem& problem;
    const Place& place;
    Schedule schedule;
    Corner corner;
    int unit = 0, last = 0;  // of the segment: where it stands and ends
    int count = 0;           // blocks of this stage

    INLINE Walk(const Problem& problem, const Place& place) : problem(problem), place(place), schedule(place.schedule()) {}

    INLINE bool at_body() const { return unit < problem.blocks; }
    INLINE bool at_finish() const { return unit == schedule.units - 1; }

    INLINE void advance() { unit += count; }

    // The stage after the last one advanced over; false at the end. `entered` tells that a segment begins.
    INLINE bool next(bool& entered) {
        entered = false;
        while (unit == last) {
            Segment segment;
            if (!schedule.next(segment)) return false;
            corner = place.corner(segment.tile);
            // Who finishes a tile does the whole outlier block; another's segment ends with its last body block.
            unit = min(segment.first, problem.blocks);
            last = segment.last == schedule.units ? segment.last : min(segment.last, problem.blocks);
            entered = true;
        }
        count = at_body() ? min(STAGE_BLOCKS, min(last, problem.blocks) - unit) : 1;
        return true;
    }
};

// Weights and their scales: they do not depend on the previous kernel, so their first ring is on its way before it ends.
INLINE void produce_weights(const Problem& problem, const Place& place, const Ring& ring) {
    // Weights that only one token tile reads are read once.
    const uint64 policy = EXPERTS || problem.token_tiles > 1 ? policy_evict_last() : policy_evict_first();
    const long long row_group_bytes = static_cast<long long>(problem.blocks) * WEIGHT_BYTES;
    const bool outliers = problem.outlier_weights;
    const uint8* source = nullptr;
    bool entered;
    RingPosition at;
#pragma unroll 1
    for (Walk walk(problem, place); walk.next(entered); walk.advance(), at.advance()) {
        if (entered) source = problem.weights + walk.corner.weight_group * row_group_bytes + walk.unit * WEIGHT_BYTES;
        ring.wait_empty(at);
        uint64& full = ring.full[at.stage];
        if (walk.at_body()) {
            const int bytes = walk.count * WEIGHT_BYTES;
            barrier_arrive_expecting(full, ROW_GROUPS * bytes);
#pragma unroll
            for (int group = 0; group < ROW_GROUPS; ++group)
                bulk_copy(ring.weights(at.stage, group, 0), source + group * row_group_bytes, bytes, full, policy);
            source += bytes;
        } else if (!walk.at_finish()) {
            const long long first = static_cast<long long>(walk.corner.weight_group) * INT8_BLOCK_BYTES;
            barrier_arrive_expecting(full, ROW_GROUPS * INT8_BLOCK_BYTES);
            bulk_copy(ring.activations(at.stage), problem.outlier_weights + first, ROW_GROUPS * INT8_BLOCK_BYTES, full, policy);
        } else {
            const int bytes = ROW_GROUPS * BLOCK_ROWS * 4, first = walk.corner.weight_group * BLOCK_ROWS;
            barrier_arrive_expecting(full, outliers ? 2 * bytes : bytes);
            bulk_copy(ring.scales(at.stage, ROW), problem.row_scale + first, bytes, full, policy);
            if (outliers) bulk_copy(ring.scales(at.stage, OUTLIER_ROW), problem.outlier_row_scale + first, bytes, full, policy);
        }
    }
}

// Activations and their scales.
INLINE void produce_activations(const Problem& problem, const Place& place, const Ring& ring) {
    const uint64 policy = policy_evict_last();
    const long long plane_bytes = static_cast<long long>(problem.padded_tokens) * 128;
    const bool outliers = problem.outlier_weights;
    const uint8* source = nullptr;
    int tokens = 0;  // of the tile that exist
    bool entered;
    RingPosition at;
    wait_for_previous_kernel();
#pragma unroll 1
    for (Walk walk(problem, place); walk.next(entered); walk.advance(), at.advance()) {
        if (entered) {
            source = problem.activations + walk.unit * PLANES * plane_bytes + walk.corner.token * 128;
            const int end = EXPERTS ? (walk.corner.last_token + 7) / 8 * 8 : problem.padded_tokens;
            tokens = min(TOKENS, end - walk.corner.token);
        }
        ring.wait_empty(at);
        uint64& full = ring.full[at.stage];
        const int planes = walk.count * PLANES;
        int operand = planes * tokens * 128;
        if (walk.at_finish()) {
            if (!outliers) operand = 0;
            const int bytes = tokens * 4;
            barrier_arrive_expecting(full, operand + (outliers ? 2 * bytes : bytes));
            bulk_copy(ring.scales(at.stage, TOKEN), problem.token_scale + walk.corner.token, bytes, full, policy);
            if (outliers)
                bulk_copy(ring.scales(at.stage, OUTLIER_TOKEN), problem.outlier_token_scale + walk.corner.token, bytes, full, policy);
        } else {
            if (!walk.at_body()) operand = 0;  // the outliers' weights have this stage for themselves
            barrier_arrive_expecting(full, operand);
        }
        if (operand == 0) continue;
        if (CLUSTER > 1) {
            // Each block of the cluster copies its share of the tokens to all of them.
            constexpr int SHARE = TOKENS / CLUSTER;
            const int offset = place.rank * SHARE * 128, bytes = min(SHARE, tokens - place.rank * SHARE) * 128;
            for (int plane = 0; plane < planes && bytes > 0; ++plane, source += plane_bytes)
                bulk_copy_multicast(ring.plane(at.stage, plane) + offset, source + offset, bytes, full, (1 << CLUSTER) - 1, policy);
        } else if (problem.padded_tokens == TOKENS && tokens == TOKENS) {  // then planes follow each other without a gap
            bulk_copy(ring.activations(at.stage), source, operand, full, policy);
            source += operand;
        } else {
            for (int plane = 0; plane < planes; ++plane, source += plane_bytes)
                bulk_copy(ring.plane(at.stage, plane), source, tokens * 128, full, policy);
        }
    }
}
