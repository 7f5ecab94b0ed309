// 4-bit operands with float scales per group on both sides, exactly: y = sum over groups of s_x * s_w * (sum of codes),
// for sm_90a. INT4 with fp16 scales is the paper's W4A4; E2M1 with fp16 scales per 128, E8M0 per 32 (MXFP4) or E4M3 per
// 16 (NVFP4) are the FP4 formats. Both code sets are exact in e4m3, and so is the sum of a group.
//
// Weights are the A operand, unpacked in registers; activations, e4m3 bytes, come through shared memory. A producer feeds
// a ring of stages, one k-block of 128 channels each; ROW_GROUPS warpgroups take 64 output channels each, multiply one
// group at a time, and promote it: two float operations per output and group, which is what this kernel's time is made of
// when there are many tokens. Splits of a tile are added in a fixed order: results do not change from run to run.
#include "gemm_groups_sm90a_load.cuh"
#include "mma_e4m3.cuh"
#include "numbers.cuh"
#include "store.cuh"

// ----------------------------------------------------------------------------------------------------- unpack

// A byte holds a code of row g and one of row g + 8, {sign a, sign b, magnitude b (3 bits), magnitude a (3 bits)}.
INLINE uint32 upper_row(uint32 word) {
    return element == INT4 ? word & 0x87878787 : (word & 0x80808080) | (word << 2 & 0x1C1C1C1C);
}
INLINE uint32 lower_row(uint32 word) {
    return (word << 1 & 0x80808080) | (element == INT4 ? word >> 3 & 0x07070707 : word >> 1 & 0x1C1C1C1C);
}

INLINE void unpack_codes(WeightFragment& fragment, const uint8* block, int thread) {
    const uint4* packed = reinterpret_cast<const uint4*>(block) + thread;
    const uint4 first = packed[0], second = packed[128];
    const uint32 words[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
    for (int word = 0; word < 8; ++word) {
        fragment.step[word / 2][word % 2 * 2] = upper_row(words[word]);
        fragment.step[word / 2][word % 2 * 2 + 1] = lower_row(words[word]);
    }
}

INLINE float row_scale(const uint8* scales, int row, int group) {
    const int index = row * GROUPS + group;
    if (weight_scale == FP16) return to_float(reinterpret_cast<const fp16*>(scales)[index]);
    return weight_scale == E8M0 ? e8m0_value(scales[index]) : e4m3_value(scales[index]);
}

// -------------------------------------------------------------------------------------------------- consumers

// A warp's place in the work, in shared memory: between tiles nobody has registers to spare.
struct WorkState {
    Schedule schedule;
    Segment segment;
    int more;
};

struct Consumer {
    const Problem& problem;
    const Ring ring;
    uint8* staging;  // this warp's output on its way from registers to memory
    const int group, thread, warp, lane;
    RingPosition at;

    using Sums = float[TOKENS / 2];
    using Part = float[PART_TOKENS / 2];  // one group's sums of some of the tokens

    INLINE Consumer(const Problem& problem, const Ring& ring, uint8* shared, int group)
        : problem(problem), ring(ring), group(group), thread(threadIdx.x % WARPGROUP), warp(thread / 32), lane(thread % 32) {
        staging = shared + (group * 4 + warp) * STORE_TOKENS * STORE_PITCH;
    }

    // Starts the MMAs of one group of channels, from zero. A k32 step spans two groups of 16: the other half of A is zero then.
    INLINE void multiply(Part& part, const WeightFragment& fragment, uint64 operand, int index) const {
        mma_fence();
        if constexpr (GROUP == 16) {
            const uint32(&step)[4] = fragment.step[index / 2];
            const uint32 half[4] = {index % 2 ? 0 : step[0], index % 2 ? 0 : step[1], index % 2 ? step[2] : 0, index % 2 ? step[3] : 0};
            mma_e4m3(part, half, operand + index / 2 * DESCRIPTOR_K32, 0);
        } else {
            constexpr int STEPS = GROUP / 32;
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
                mma_e4m3(part, fragment.step[index * STEPS + step], operand + (index * STEPS + step) * DESCRIPTOR_K32, step);
        }
        mma_commit();
    }

    // The MMAs of this part are done, those of `in_flight` later parts need not be.
    INLINE void wait_for(Part& part, int in_flight) const {
        if (in_flight == 0) mma_wait<0>();
        if (in_flight == 1) mma_wait<1>();
        if (in_flight == 2) mma_wait<2>();
        if (in_flight == 3) mma_wait<3>();
#pragma unroll
        for (int i = 0; i < PART_TOKENS / 2; ++i) asm volatile("" : "+f"(part[i])::"memory");
    }

    INLINE void promote_group(Sums& sums, const Part& part, int first, int index, float upper, float lower, const float* token_scales) const {
        const float* scales = token_scales + (first + lane % 4 * 2) * GROUPS + index;
#pragma unroll
        for (int column = 0; column < PART_TOKENS / 8; ++column) {
            const float* pair = scales + column * 8 * GROUPS;
            const float2 scale = GROUPS == 1 ? *reinterpret_cast<const float2*>(pair) : make_float2(pair[0], pair[GROUPS]);
            float* sum = sums + first / 2 + column * 4;
            sum[0] += upper * (scale.x * part[column * 4]);
            sum[1] += upper * (scale.y * part[column * 4 + 1]);
            sum[2] += lower * (scale.x * part[column * 4 + 2]);
            sum[3] += lower * (scale.y * part[column * 4 + 3]);
        }
    }

    INLINE void multiply_block(Sums& sums) {
        ring.wait_full(at);
        WeightFragment fragment;
        const uint8* block = ring.weights(at.stage, group);
        unpack_codes(fragment, block, thread);
        const uint64 operand = operand_descriptor(ring.activations(at.stage));
        const int row = warp * 16 + lane / 4;
#pragma unroll
        for (int index = 0; index < GROUPS; ++index) {
            const float upper = row_scale(block + CODE_BYTES, row, index) * CODE_UNIT;
            const float lower = row_scale(block + CODE_BYTES, row + 8, index) * CODE_UNIT;
            // Parts of the tokens: while one is promoted, the MMAs of the next ones run, as many as registers allow.
            constexpr int PARTS = TOKENS / PART_TOKENS, TOGETHER = LARGE ? PARTS : 1;
            static_assert(TOGETHER <= 4, "see wait_for");
#pragma unroll
            for (int begin = 0; begin < PARTS; begin += TOGETHER) {
                Part parts[TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) multiply(parts[i], fragment, operand + (begin + i) * PART_TOKENS * DESCRIPTOR_ROW, index);
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    wait_for(parts[i], TOGETHER - 1 - i);
                    promote_group(sums, parts[i], (begin + i) * PART_TOKENS, index, upper, lower, ring.token_scales(at.stage));
                }
            }
        }
        ring.release(at.stage, lane);
        at.advance();
    }

    // ---- splits of a tile meet in memory, warp by warp

    INLINE float4* partial(int block) const { return problem.partials + ((block * ROW_GROUPS + group) * 4 + warp) * (TOKENS / 8 * 32) + lane; }
    INLINE int* flag(int block) const { return problem.flags + (block * ROW_GROUPS + group) * 4 + warp; }

    INLINE void give(const Sums& sums) const {
        float4* target = partial(blockIdx.x);
#pragma unroll
        for (int i = 0; i < TOKENS / 8; ++i) __stcg(target + i * 32, make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]));
        __syncwarp();
        if (lane == 0) raise_flag(flag(blockIdx.x));
    }

    // Blocks beyond the units to share have nothing to give.
    INLINE bool gives(int block, int total) const {
        return Schedule::run_begin(total, block, gridDim.x) < Schedule::run_begin(total, block + 1, gridDim.x);
    }

    // Adds what the blocks before this one have summed of the tile whose first unit is `tile_begin`, nearest first. Each
    // lane waits for another block, so that a row of flags costs the time of one.
    INLINE void take(Sums& sums, int tile_begin) const {
        wait_for_previous_kernel();  // a run of the outliers alone comes here before it has met any activations: flags may be that one's
        const int total = problem.split_tiles * problem.units();
#pragma unroll 1
        for (int last = blockIdx.x - 1; Schedule::run_begin(total, last + 1, gridDim.x) > tile_begin; last -= 32) {
            const int mine = last - lane;
            const bool waits = mine >= 0 && gives(mine, total) && Schedule::run_begin(total, mine + 1, gridDim.x) > tile_begin;
            if (waits) wait_for_flag(flag(mine));
            unsigned waiting = __ballot_sync(~0u, waits);
#pragma unroll 1
            while (waiting) {
                const float4* sources[TAKE_TOGETHER];
                float share[TAKE_TOGETHER];  // 0 where there are fewer left
#pragma unroll
                for (int part = 0; part < TAKE_TOGETHER; ++part) {
                    sources[part] = waiting ? partial(last - (__ffs(waiting) - 1)) : sources[0];
                    share[part] = waiting ? 1.f : 0.f;
                    waiting &= waiting - 1;
                }
#pragma unroll
                for (int i = 0; i < TOKENS / 8; ++i) {
                    float4 parts[TAKE_TOGETHER];
#pragma unroll
                    for (int part = 0; part < TAKE_TOGETHER; ++part) parts[part] = __ldcg(sources[part] + i * 32);
#pragma unroll
                    for (int part = 0; part < TAKE_TOGETHER; ++part) {
                        sums[4 * i] += share[part] * parts[part].x;
                        sums[4 * i + 1] += share[part] * parts[part].y;
                        sums[4 * i + 2] += share[part] * parts[part].z;
                        sums[4 * i + 3] += share[part] * parts[part].w;
                    }
                }
            }
            if (waits) *flag(mine) = 0;
        }
    }

    // ---- what finishes a tile

    INLINE float per_row(const float* values, int row, float otherwise) const { return values && row < problem.rows ? values[row] : otherwise; }

    INLINE void scale_rows(Sums& sums, int row) const {
        const float upper = per_row(problem.row_scale, row, 1.f), lower = per_row(problem.row_scale, row + 8, 1.f);
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sums[i] *= i / 2 % 2 ? lower : upper;
    }

    INLINE void read_outliers(WeightFragment& fragment, int tile) const {
        unpack_int8(fragment, problem.outlier_weights + problem.row_group(tile, group) * INT8_BLOCK_BYTES, thread);
    }

    INLINE void add_outliers(Sums& sums, const WeightFragment& fragment, int tile, int row) {
        const float upper = per_row(problem.outlier_row_scale, row, 0.f), lower = per_row(problem.outlier_row_scale, row + 8, 0.f);
        ring.wait_full(at);
        const uint64 operand = operand_descriptor(ring.activations(at.stage));
        const float2* token_scales = reinterpret_cast<const float2*>(problem.outlier_token_scale + problem.first_token(tile)) + lane % 4;
        const int tokens = problem.tile_tokens(tile);  // padded tokens come in eights
#pragma unroll
        for (int chunk = 0; chunk < TOKENS / OUTLIER_TOKENS; ++chunk) {
            int part[OUTLIER_TOKENS / 2];
#pragma unroll
            for (int i = 0; i < OUTLIER_TOKENS / 2; ++i) part[i] = 0;
            mma_fence();
#pragma unroll
            for (int step = 0; step < 4; ++step)
                mma(part, fragment.step[step], operand + chunk * OUTLIER_TOKENS * DESCRIPTOR_ROW + step * DESCRIPTOR_K32);
            mma_commit();
            mma_wait_for<0>(part);
#pragma unroll
            for (int column = 0; column < OUTLIER_TOKENS / 8; ++column) {
                const int first = chunk * OUTLIER_TOKENS + column * 8;
                const float2 scale = first < tokens ? token_scales[first / 2] : make_float2(0.f, 0.f);
                float* sum = sums + first / 2;
                sum[0] += static_cast<float>(part[column * 4]) * upper * scale.x;
                sum[1] += static_cast<float>(part[column * 4 + 1]) * upper * scale.y;
                sum[2] += static_cast<float>(part[column * 4 + 2]) * lower * scale.x;
                sum[3] += static_cast<float>(part[column * 4 + 3]) * lower * scale.y;
            }
        }
        ring.release(at.stage, lane);
        at.advance();
    }

    INLINE void store(const Sums& sums, int tile, int first_row) const {
        const float upper = per_row(problem.bias, first_row + lane / 4, 0.f), lower = per_row(problem.bias, first_row + lane / 4 + 8, 0.f);
        constexpr int TOGETHER = STORE_TOKENS == 8 ? 1 : 2;  // groups of 8 tokens in one stmatrix
#pragma unroll
        for (int offset = 0; offset < TOKENS; offset += STORE_TOKENS) {
#pragma unroll
            for (int column = 0; column < STORE_TOKENS / 8; column += TOGETHER) {
                uint32 matrix[2 * TOGETHER];
#pragma unroll
                for (int i = 0; i < TOGETHER; ++i) {
                    const float* sum = sums + (offset / 8 + column + i) * 4;
                    matrix[2 * i] = Pair<OUTPUT>::of(sum[0] + upper, sum[1] + upper);
                    matrix[2 * i + 1] = Pair<OUTPUT>::of(sum[2] + lower, sum[3] + lower);
                }
                store_matrices(staging + ((column + lane / 16 % TOGETHER) * 8 + lane % 8) * STORE_PITCH + lane / 8 % 2 * 16, matrix);
            }
            __syncwarp();
            store_rows(first_row, problem.first_token(tile) + offset);
            __syncwarp();
        }
    }

    // This warp's 16 channels of STORE_TOKENS tokens: two lanes to a token, 16 bytes each.
    INLINE void store_rows(int first_row, int first_token) const {
#pragma unroll
        for (int i = 0; i < (STORE_TOKENS * 2 + 31) / 32; ++i) {
            const int index = i * 32 + lane, token = first_token + index / 2, row = first_row + index % 2 * 8;
            if (index >= STORE_TOKENS * 2 || token >= problem.tokens || row >= problem.rows) continue;
            const uint8* source = staging + index / 2 * STORE_PITCH + index % 2 * 16;
            uint16* destination = problem.output + static_cast<long long>(token) * problem.rows + row;
            if (problem.rows % 8 == 0) {
                *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(source);
            } else {
                for (int j = 0; j < min(8, problem.rows - row); ++j) destination[j] = reinterpret_cast<const uint16*>(source)[j];
            }
        }
    }

    INLINE void run(WorkState* states) {
        WorkState& state = states[group * 4 + warp];
        if (lane == 0) state.schedule = problem.schedule();
#pragma unroll 1
        while (true) {
            if (lane == 0) state.more = state.schedule.next(state.segment);
            __syncwarp();
            if (!state.more) return;
            const Segment& segment = state.segment;
            const Schedule& schedule = state.schedule;
            Sums sums;
#pragma unroll
            for (int i = 0; i < TOKENS / 2; ++i) sums[i] = 0.f;
            const int last = min(segment.last, problem.blocks);
            const bool finishes = segment.last == problem.units(), outliers = finishes && problem.outlier_weights;
            WeightFragment fragment;  // of the outliers; where registers allow, it is read ahead
            if (TOKENS <= 32 && outliers) read_outliers(fragment, segment.tile);
#pragma unroll 1
            for (int block = segment.first; block < last; ++block) multiply_block(sums);
            if (!finishes) {
                give(sums);
                __syncwarp();
                continue;
            }
            const int split_tile = segment.tile - schedule.whole;
            if (split_tile >= 0 && segment.first > 0) take(sums, split_tile * schedule.units);
            const int first_row = problem.first_row(segment.tile, group) + warp * 16;
            if (problem.row_scale) scale_rows(sums, first_row + lane / 4);
            if (outliers) {
                if (TOKENS > 32) read_outliers(fragment, segment.tile);
                add_outliers(sums, fragment, segment.tile, first_row + lane / 4);
            }
            store(sums, segment.tile, first_row);  // ends with all lanes done with the state
        }
    }
};

// --------------------------------------------------------------------------------------------------- kernel

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
gemm(const uint8* weights, const uint8* outlier_weights, const uint8* activations, const float* group_scales, const float* row_scale,
     const float* outlier_row_scale, const float* outlier_token_scale, const float* bias, uint16* output, float4* partials, int* flags,
     int rows, int tokens, int padded_tokens, int blocks, int row_tiles, int token_tiles, int split_tiles) {
    extern __shared__ uint8 memory[];
    __shared__ uint64 full[STAGES], empty[STAGES];
    __shared__ alignas(8) uint8 states[ROW_GROUPS * 4 * sizeof(WorkState)];
    // An offset, not a rounded pointer: a pointer that went through an integer is no longer known to be shared.
    uint8* shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const Problem problem{weights, outlier_weights, activations, group_scales, row_scale, outlier_row_scale, outlier_token_scale, bias,
                          output, partials, flags, rows, tokens, padded_tokens, blocks, row_tiles, token_tiles, split_tiles};
    const Ring ring{shared, full, empty};
    const int group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // the same in a warp, and known to be

    allow_next_kernel();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full[stage], PRODUCERS);
            barrier_init(empty[stage], ROW_GROUPS * 4);
        }
        barrier_init_fence();
    }
    __syncthreads();

    if (group == ROW_GROUPS) {
        if (LARGE) give_registers<PRODUCER_REGISTERS>();
        const int role = __shfl_sync(~0u, threadIdx.x / 32, 0) - ROW_GROUPS * 4;
        if (threadIdx.x % 32 == 0 && role < PRODUCERS)
            Producer{problem, ring, token_tiles > 1 ? policy_evict_last() : policy_evict_first(), policy_evict_last(), role}.run();
    } else {
        if (LARGE) take_registers<CONSUMER_REGISTERS>();
        Consumer(problem, ring, shared + STAGES * STAGE_BYTES, group).run(reinterpret_cast<WorkState*>(states));
    }
}
