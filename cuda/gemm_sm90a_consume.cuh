// The consumers of the GEMM on sm_90a: warpgroups that multiply, add up, scale and store.
#pragma once
#include "gemm_sm90a_tiles.cuh"
#include "mma.cuh"
#include "promote.cuh"
#include "store.cuh"

struct Consumer {
    const Problem& problem;
    const Place place;
    const Ring ring;
    Sum4* exchange;    // sums of the other K groups
    uint8* staging;    // two buffers of this warpgroup's output on its way from registers to memory
    const int group, row_group, k_group, thread, warp, lane;
    RingPosition at;

    using Sums = Sum[TOKENS / 2];

    INLINE Consumer(const Problem& problem, const Place& place, const Ring& ring, uint8* shared, int group)
        : problem(problem), place(place), ring(ring), exchange(reinterpret_cast<Sum4*>(shared)), group(group),
          row_group(group % ROW_GROUPS), k_group(group / ROW_GROUPS), thread(threadIdx.x % WARPGROUP),
          warp(thread / 32), lane(thread % 32) {
        staging = shared + EXCHANGE_BYTES + row_group * 2 * STORE_TOKENS * STORE_PITCH;
    }

    template <class Number, int COUNT> INLINE void multiply(Number (&sums)[COUNT], Fragment& fragment, int block) {
        unpack(fragment, ring.weights(at.stage, row_group, block), thread);
        const uint64 operand = operand_descriptor(ring.activations(at.stage, block));
        mma_fence();
#pragma unroll
        for (int step = 0; step < 4 * PLANES; ++step)
            mma(sums, fragment.step[step], operand + step / 4 * TOKENS * DESCRIPTOR_ROW + step % 4 * DESCRIPTOR_K32);
        mma_commit();
    }

    // Adds this warpgroup's share of `blocks` blocks.
    INLINE void multiply_blocks(Sums& sums, int blocks) {
        if constexpr (SUMMED_BLOCKS > 0) multiply_in_short_sums(sums, blocks);
        else multiply_in_long_sums(sums, blocks);
    }

    // With two fragments one batch of MMAs stays in flight while the next block is unpacked; a stage is given back when
    // nothing that reads it is in flight. The assembler follows MMAs in flight only through straight code: stages that
    // are not full come last, one at a time.
    template <class Number, int COUNT> INLINE void multiply_in_long_sums(Number (&sums)[COUNT], int blocks) {
        constexpr int TOGETHER = FRAGMENTS > VISITS ? FRAGMENTS / VISITS : 1;  // stages, so that fragments have constant indices
        Fragment fragments[FRAGMENTS];
        int previous = -1;
#pragma unroll 1
        for (; blocks >= TOGETHER * STAGE_BLOCKS; blocks -= TOGETHER * STAGE_BLOCKS) {
#pragma unroll
            for (int visit = 0; visit < TOGETHER * VISITS; ++visit) {
                if (visit % VISITS == 0) ring.wait_full(at);
                multiply(sums, fragments[visit % FRAGMENTS], visit % VISITS * K_GROUPS + k_group);
                mma_wait<FRAGMENTS - 1>();
                if (FRAGMENTS == 2 && visit % VISITS == 0 && previous >= 0) ring.release(previous, lane);
                if (visit % VISITS == VISITS - 1) {
                    previous = at.stage;
                    if (FRAGMENTS == 1) ring.release(at.stage, lane);
                    at.advance();
                }
            }
        }
        mma_wait_for<0>(sums);
        if (FRAGMENTS == 2 && previous >= 0) ring.release(previous, lane);
#pragma unroll 1
        for (; blocks > 0; blocks -= STAGE_BLOCKS) {
            ring.wait_full(at);
#pragma unroll 1
            for (int block = k_group; block < min(blocks, STAGE_BLOCKS); block += K_GROUPS) {
                multiply(sums, fragments[0], block);
                mma_wait_for<0>(sums);
            }
            pass_stage();
        }
    }

    // The same for MMAs that do not add in full precision: after SUMMED_BLOCKS blocks they begin again from zero, and their
    // sums are added up here, of as many tokens at a time as there are registers for.
    template <class Number, int COUNT> INLINE void multiply_in_short_sums(Number (&sums)[COUNT], int blocks) {
        constexpr int TOGETHER = SUMMED_BLOCKS / VISITS, PART = min_of(TOKENS, CONSUMER_GROUPS == 4 ? 32 : 64);
        Fragment fragments[TOGETHER * VISITS];
        Number part[PART / 2];
#pragma unroll 1
        for (; blocks >= TOGETHER * STAGE_BLOCKS; blocks -= TOGETHER * STAGE_BLOCKS) {
            int stages[TOGETHER];
#pragma unroll
            for (int first = 0; first < TOKENS; first += PART) {
#pragma unroll
                for (int visit = 0; visit < TOGETHER * VISITS; ++visit) {
                    if (first == 0 && visit % VISITS == 0) {
                        ring.wait_full(at);
                        stages[visit / VISITS] = at.stage;
                        at.advance();
                    }
                    const int stage = stages[visit / VISITS], block = visit % VISITS * K_GROUPS + k_group;
                    if (first == 0) unpack(fragments[visit], ring.weights(stage, row_group, block), thread);
                    multiply_part(part, fragments[visit], stage, block, first, visit > 0);
                }
                mma_wait_for<0>(part);
                if (first + PART == TOKENS) {
#pragma unroll
                    for (int stage = 0; stage < TOGETHER; ++stage) ring.release(stages[stage], lane);
                }
#pragma unroll
                for (int i = 0; i < PART / 2; ++i) sums[first / 2 + i] += part[i];
            }
        }
#pragma unroll 1
        for (; blocks > 0; blocks -= STAGE_BLOCKS) {
            ring.wait_full(at);
#pragma unroll 1
            for (int block = k_group; block < min(blocks, STAGE_BLOCKS); block += K_GROUPS) {
                unpack(fragments[0], ring.weights(at.stage, row_group, block), thread);
#pragma unroll
                for (int first = 0; first < TOKENS; first += PART) {
                    multiply_part(part, fragments[0], at.stage, block, first, false);
                    mma_wait_for<0>(part);
#pragma unroll
                    for (int i = 0; i < PART / 2; ++i) sums[first / 2 + i] += part[i];
                }
            }
            pass_stage();
        }
    }

    template <class Number, int COUNT>
    INLINE void multiply_part(Number (&part)[COUNT], const Fragment& fragment, int stage, int block, int first_token, bool add) const {
        const uint64 operand = operand_descriptor(ring.activations(stage, block)) + first_token * DESCRIPTOR_ROW;
        mma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if (add || step > 0) mma(part, fragment.step[step], operand + step * DESCRIPTOR_K32);
            else mma<false>(part, fragment.step[step], operand + step * DESCRIPTOR_K32);
        }
        mma_commit();
    }

    // Sums of the other K groups come to the first one through shared memory.
    INLINE void reduce_k_groups(Sums& sums) {
        constexpr int WARP_SUMS = TOKENS / 8 * 32;  // Sum4 of one warp
        constexpr int MEMBERS = K_GROUPS * WARPGROUP;
        const auto of = [&](int other) { return exchange + (((other - 1) * ROW_GROUPS + row_group) * 4 + warp) * WARP_SUMS; };
        named_barrier_sync(1 + row_group, MEMBERS);  // the last segment's sums have been read
        if (k_group > 0) store_partial(of(k_group), sums, lane);
        named_barrier_sync(1 + row_group, MEMBERS);  // this one's have been written
        if (k_group > 0) return;
        for (int other = 1; other < K_GROUPS; ++other) add_partial(sums, of(other), lane);
    }

    INLINE Sum4* partial(int block) const { return problem.partials + ((block * ROW_GROUPS + row_group) * 4 + warp) * (TOKENS / 8 * 32); }
    INLINE int* flag(int block) const { return problem.flags + (block * ROW_GROUPS + row_group) * 4 + warp; }

    // Warps exchange with the same warp of the other block: no barrier is wider than a warp. Whoever has multiplied nothing,
    // because its run begins behind the body, has not waited for the previous kernel yet, whose flags these may still be.
    INLINE void give(const Sums& sums) const {
        wait_for_previous_kernel();
        store_partial(partial(blockIdx.x), sums, lane);
        __syncwarp();
        if (lane == 0) raise_flag(flag(blockIdx.x));
    }

    // Adds what the clusters before this one have summed of the tile whose first unit is `tile_begin`.
    INLINE void take(Sums& sums, int tile_begin) const {
        wait_for_previous_kernel();
        const int total = place.split_tiles() * problem.units();
        int begin = Schedule::run_begin(total, place.cluster, place.clusters);
        for (int cluster = place.cluster - 1; begin > tile_begin; --cluster) {
            const int end = begin;
            begin = Schedule::run_begin(total, cluster, place.clusters);
            if (begin == end) continue;
            const int block = cluster * CLUSTER + place.rank;
            wait_for_flag(flag(block));
            add_partial(sums, partial(block), lane);
            __syncwarp();
            if (lane == 0) *flag(block) = 0;
        }
    }

    // Scales the sums of a finished tile, adds the outlier channels and the bias, and stores, STORE_TOKENS at a time.
    // The outlier MMAs of the next tokens run while those of these are scaled.
    template <bool OUTLIERS> INLINE void finish(const Sums& sums, const Segment& segment) {
        const Corner corner = place.corner(segment.tile);
        const int first_row = (corner.row_group + row_group) * BLOCK_ROWS;
        WeightFragment outlier_fragment;
        if (OUTLIERS) {
            ring.wait_full(at);
            unpack_int8(outlier_fragment, ring.activations(at.stage) + row_group * INT8_BLOCK_BYTES, thread);
            pass_stage();
        }
        ring.wait_full(at);
        float row_scale[2], outlier_row_scale[2], bias[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp * 16 + lane / 4 + 8 * half;
            row_scale[half] = ring.scales(at.stage, ROW)[row_group * BLOCK_ROWS + row];
            if (OUTLIERS) outlier_row_scale[half] = ring.scales(at.stage, OUTLIER_ROW)[row_group * BLOCK_ROWS + row];
            bias[half] = problem.bias && first_row + row < problem.rows ? problem.bias[first_row + row] : 0.f;
        }
        int outlier_sums[2][STORE_TOKENS / 2];
        if (OUTLIERS) multiply_outliers(outlier_sums[0], outlier_fragment, 0);
#pragma unroll
        for (int chunk = 0; chunk < TOKENS; chunk += STORE_TOKENS) {
            int(&outliers)[STORE_TOKENS / 2] = outlier_sums[chunk / STORE_TOKENS % 2];
            if (OUTLIERS && chunk + STORE_TOKENS < TOKENS) {
                multiply_outliers(outlier_sums[(chunk / STORE_TOKENS + 1) % 2], outlier_fragment, chunk + STORE_TOKENS);
                mma_wait_for<1>(outliers);
            } else if (OUTLIERS) {
                mma_wait_for<0>(outliers);
            }
            uint8* buffer = staging + chunk / STORE_TOKENS % 2 * STORE_TOKENS * STORE_PITCH;
            constexpr int TOGETHER = min_of(STORE_TOKENS / 8, 2);  // 8x8 column groups of one stmatrix
#pragma unroll
            for (int column = 0; column < STORE_TOKENS / 8; column += TOGETHER) {
                uint32 matrix[2 * TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    const int sum = (chunk / 8 + column + i) * 4, outlier_sum = (column + i) * 4;
                    const int token = chunk + (column + i) * 8 + lane % 4 * 2;
                    const float2 scale = *reinterpret_cast<const float2*>(ring.scales(at.stage, TOKEN) + token);
                    float2 outlier_scale;
                    if (OUTLIERS) outlier_scale = *reinterpret_cast<const float2*>(ring.scales(at.stage, OUTLIER_TOKEN) + token);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float low = bias[half], high = bias[half];
                        if (OUTLIERS) {
                            low = promote(outliers[outlier_sum + 2 * half], outlier_row_scale[half], outlier_scale.x, low);
                            high = promote(outliers[outlier_sum + 2 * half + 1], outlier_row_scale[half], outlier_scale.y, high);
                        }
                        low = promote(sums[sum + 2 * half], row_scale[half], scale.x, low);
                        high = promote(sums[sum + 2 * half + 1], row_scale[half], scale.y, high);
                        matrix[2 * i + half] = Pair<OUTPUT>::of(low, high);
                    }
                }
                const int token = (column + lane / 16 % TOGETHER) * 8 + lane % 8;
                store_matrices(buffer + token * STORE_PITCH + warp * 32 + lane / 8 % 2 * 16, matrix);
            }
            // Who is past this barrier has stored the chunk before: its buffer is free for the one after.
            named_barrier_sync(STORE_BARRIER + row_group, WARPGROUP);
            store_rows(buffer, first_row, corner.token + chunk, corner);
        }
        pass_stage();
    }

    INLINE void multiply_outliers(int (&sums)[STORE_TOKENS / 2], const WeightFragment& fragment, int first_token) const {
        const uint64 operand = operand_descriptor(ring.activations(at.stage)) + first_token * DESCRIPTOR_ROW;
        mma_fence();
        mma<false>(sums, fragment.step[0], operand);
#pragma unroll
        for (int step = 1; step < 4; ++step) mma(sums, fragment.step[step], operand + step * DESCRIPTOR_K32);
        mma_commit();
    }

    INLINE void pass_stage() {
        ring.release(at.stage, lane);
        at.advance();
    }

    // The warpgroup's 64 channels of STORE_TOKENS tokens: eight lanes to a token, 16 bytes each, whole lines of 128.
    INLINE void store_rows(const uint8* buffer, int first_row, int first_token, const Corner& corner) const {
        const int local = warp * 4 + lane / 8, row = first_row + lane % 8 * 8;
        const int channels = min(8, problem.rows - row);
        const uint8* source = buffer + local * STORE_PITCH + lane % 8 * 16;
        uint16* destination = problem.output + static_cast<long long>(first_token + local) * problem.rows + row;
        const int rest = channels > 0 ? corner.last_token - first_token - local : 0;
        const int others = EXPERTS ? corner.first_token - first_token - local : 0;
#pragma unroll
        for (int i = 0; i < STORE_TOKENS; i += 16, source += 16 * STORE_PITCH, destination += 16 * problem.rows) {
            if (i < others || i >= rest || STORE_TOKENS < 16 && local >= STORE_TOKENS) continue;
            if (problem.rows % 8 == 0) {
                *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(source);
            } else {
#pragma unroll 1
                for (int j = 0; j < channels; ++j) destination[j] = reinterpret_cast<const uint16*>(source)[j];
            }
        }
    }

    INLINE void run() {
        Schedule schedule = place.schedule();
        Segment segment;
#pragma unroll 1
        while (schedule.next(segment)) {
            const bool finishes = segment.last == problem.units();
            Sums sums;
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0;
            multiply_blocks(sums, min(segment.last, problem.blocks) - min(segment.first, problem.blocks));
            if (K_GROUPS > 1) reduce_k_groups(sums);
            if (k_group > 0) {
                for (int unit = problem.blocks; finishes && unit < problem.units(); ++unit) {
                    ring.wait_full(at);
                    pass_stage();
                }
                continue;
            }
            if (!finishes) {
                give(sums);
                continue;
            }
            const int split_tile = segment.tile - schedule.whole;
            if (split_tile >= 0 && segment.first > 0) take(sums, split_tile * schedule.units);
            if (TAKES_OUTLIERS && problem.outlier_weights) finish<true>(sums, segment);
            else finish<false>(sums, segment);
        }
    }
};
