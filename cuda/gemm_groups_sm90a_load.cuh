// The GEMM with group scales on sm_90a: its parameters, the ring of stages, and the warps that fill it.
#pragma once
#include "load.cuh"
#include "schedule.cuh"
#include "unpack.cuh"

// TOKENS, PART_TOKENS, ROW_GROUPS, STAGES, BLOCKS_PER_SM, ELEMENT, GROUP, WEIGHT_SCALE and OUTPUT come from the compiler's command line.
enum Element { INT4, E2M1 };
enum WeightScale { FP16, E8M0, E4M3 };
constexpr Element element = ELEMENT;
constexpr WeightScale weight_scale = WEIGHT_SCALE;

constexpr int WARPGROUP = 128;
constexpr bool LARGE = BLOCKS_PER_SM == 1;  // registers move from a producer warpgroup to the consumers
// Warps that issue copies: one for the activations, the others for weights. Issuing takes about 0.1 us a copy, which a
// single warp could not hide behind a k-block's arithmetic.
constexpr int WEIGHT_PRODUCERS = LARGE ? ROW_GROUPS : 1;
constexpr int PRODUCERS = 1 + WEIGHT_PRODUCERS;
constexpr int THREADS = ROW_GROUPS * WARPGROUP + (LARGE ? WARPGROUP : PRODUCERS * 32);
constexpr int PRODUCER_REGISTERS = ROW_GROUPS == 3 ? 32 : 40;
constexpr int CONSUMER_REGISTERS = ROW_GROUPS == 3 ? 160 : 232;

constexpr int GROUPS = BLOCK_K / GROUP;  // of a k-block
constexpr int SCALE_BYTES = weight_scale == FP16 ? 2 : 1;
constexpr int CODE_BYTES = BLOCK_ROWS * BLOCK_K / 2;
constexpr int WEIGHT_BYTES = CODE_BYTES + BLOCK_ROWS * GROUPS * SCALE_BYTES;
constexpr int OPERAND_BYTES = TOKENS * BLOCK_K;
constexpr int TOKEN_SCALE_BYTES = GROUPS * TOKENS * 4;
constexpr int STAGE_BYTES = (OPERAND_BYTES + TOKEN_SCALE_BYTES + ROW_GROUPS * WEIGHT_BYTES + 1023) / 1024 * 1024;
constexpr int STORE_TOKENS = TOKENS < 32 ? TOKENS : 32;
constexpr int STORE_PITCH = 48;  // 16 channels are 32 bytes; 48 keep stmatrix and the reads back free of bank conflicts
constexpr int OUTLIER_TOKENS = TOKENS < 32 ? TOKENS : 32;  // tokens of one outlier MMA: its sums must fit beside the body's

constexpr int TAKE_TOGETHER = TOKENS <= 16 ? 4 : TOKENS <= 32 ? 2 : 1;  // partial sums on their way at a time

// Codes enter the MMA times 2^-9 (integers) or 2^-6 (E2M1) on both sides.
constexpr float CODE_UNIT = element == INT4 ? 262144.f : 4096.f;

struct Problem {
    const uint8* weights;           // [row group of 64][block][WEIGHT_BYTES]
    const uint8* outlier_weights;   // [row group][INT8_BLOCK_BYTES], or null
    const uint8* activations;       // [block, the outliers' last][padded_tokens][128], swizzled; outliers are s8
    const float* group_scales;      // [block][padded_tokens][GROUPS]
    const float* row_scale;         // [rows], or null: the tensor scale of E4M3 scales
    const float* outlier_row_scale;
    const float* outlier_token_scale;
    const float* bias;              // [rows], or null
    uint16* output;                 // [tokens][rows]
    float4* partials;               // one tile for each block of the grid
    int* flags;                     // one for each warp of the grid's consumers, zero between launches
    int rows, tokens, padded_tokens, blocks, row_tiles, token_tiles, split_tiles;

    INLINE int units() const { return blocks + (outlier_weights ? 1 : 0); }
    INLINE int first_token(int tile) const { return tile % token_tiles * TOKENS; }
    INLINE int tile_tokens(int tile) const { return min(TOKENS, padded_tokens - first_token(tile)); }
    // Rows past the last group repeat it; what they give is not stored.
    INLINE long long row_group(int tile, int group) const { return min(tile / token_tiles * ROW_GROUPS + group, (rows - 1) / BLOCK_ROWS); }
    INLINE int first_row(int tile, int group) const { return (tile / token_tiles * ROW_GROUPS + group) * BLOCK_ROWS; }
    INLINE Schedule schedule() const { return Schedule(row_tiles * token_tiles, split_tiles, units(), blockIdx.x, gridDim.x); }
};

struct RingPosition {
    int stage = 0;
    uint32 parity = 0;

    INLINE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

struct Ring {
    uint8* stages;
    uint64 *full, *empty;

    INLINE uint8* activations(int stage) const { return stages + stage * STAGE_BYTES; }
    INLINE float* token_scales(int stage) const { return reinterpret_cast<float*>(activations(stage) + OPERAND_BYTES); }
    INLINE uint8* weights(int stage, int row_group) const {
        return activations(stage) + OPERAND_BYTES + TOKEN_SCALE_BYTES + row_group * WEIGHT_BYTES;
    }
    INLINE void wait_full(RingPosition at) const { barrier_wait(full[at.stage], at.parity); }
    INLINE void wait_empty(RingPosition at) const { barrier_wait(empty[at.stage], at.parity ^ 1); }
    INLINE void release(int stage, int lane) const {
        __syncwarp();  // scales and weights were read by all lanes
        if (lane == 0) barrier_arrive(empty[stage]);
    }
};

// ------------------------------------------------------------------------------------------------------- load

// The k-blocks this block's ring takes in, in order; unit `blocks` is the outliers.
struct Walk {
    Schedule schedule;
    Segment segment{0, 0, 0};
    int unit = -1;

    INLINE explicit Walk(const Problem& problem) : schedule(problem.schedule()) {}

    INLINE bool next() {
        if (++unit < segment.last) return true;
        if (!schedule.next(segment)) return false;
        unit = segment.first;
        return true;
    }
};

struct Producer {
    const Problem& problem;
    const Ring ring;
    const uint64 weight_policy, activation_policy;
    const int role;  // 0: activations; otherwise weights of every WEIGHT_PRODUCERS-th row group

    // Outlier weights go from memory straight to registers: they are used once, by the one who finishes the tile.
    INLINE void load_weights(const Walk& walk, int stage) const {
        if (walk.unit == problem.blocks) {
            barrier_arrive(ring.full[stage]);
            return;
        }
        constexpr int SHARE = ROW_GROUPS / WEIGHT_PRODUCERS;
        barrier_arrive_expecting(ring.full[stage], SHARE * WEIGHT_BYTES);
#pragma unroll
        for (int i = 0; i < SHARE; ++i) {
            const int group = role - 1 + i * WEIGHT_PRODUCERS;
            bulk_copy(ring.weights(stage, group),
                      problem.weights + (problem.row_group(walk.segment.tile, group) * problem.blocks + walk.unit) * WEIGHT_BYTES,
                      WEIGHT_BYTES, ring.full[stage], weight_policy);
        }
    }

    INLINE void load_activations(const Walk& walk, int stage) const {
        const int first = problem.first_token(walk.segment.tile), tokens = problem.tile_tokens(walk.segment.tile);
        const bool outliers = walk.unit == problem.blocks;
        const long long row = static_cast<long long>(walk.unit) * problem.padded_tokens + first;
        barrier_arrive_expecting(ring.full[stage], tokens * (BLOCK_K + (outliers ? 0 : GROUPS * 4)));
        bulk_copy(ring.activations(stage), problem.activations + row * BLOCK_K, tokens * BLOCK_K, ring.full[stage], activation_policy);
        if (!outliers)
            bulk_copy(ring.token_scales(stage), problem.group_scales + row * GROUPS, tokens * GROUPS * 4, ring.full[stage], activation_policy);
    }

    // Weights do not depend on the previous kernel: the first ring of them is on its way before that has ended.
    INLINE void run() const {
        if (role == 0) wait_for_previous_kernel();
        Walk walk(problem);
        RingPosition at;
#pragma unroll 1
        for (int index = 0; walk.next(); ++index, at.advance()) {
            if (index >= STAGES) ring.wait_empty(at);
            if (role == 0) load_activations(walk, at.stage);
            if (role > 0) load_weights(walk, at.stage);
        }
    }
};
