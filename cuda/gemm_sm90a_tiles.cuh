// The GEMM with unpacked weights on sm_90a: its parameters, the ring of stages, and which tiles a block takes.
#pragma once
#include "cluster.cuh"
#include "load.cuh"
#include "schedule.cuh"
#include "store.cuh"
#include "unpack.cuh"

// TOKENS, ROW_GROUPS, K_GROUPS, STAGES, STAGE_BLOCKS, CLUSTER, BLOCKS_PER_SM, FRAGMENTS, EXPERTS and OUTPUT come from
// the compiler's command line. With two FRAGMENTS a warpgroup unpacks its next block while the MMAs of the last one run.
__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
using Sum4 = FourOf<Sum>::Type;
constexpr int WARPGROUP = 128;
constexpr int CONSUMER_GROUPS = ROW_GROUPS * K_GROUPS;
constexpr bool LARGE = BLOCKS_PER_SM == 1;  // registers move from a producer warpgroup to the consumers
constexpr int THREADS = CONSUMER_GROUPS * WARPGROUP + (LARGE ? WARPGROUP : 64);
constexpr int PRODUCER_REGISTERS = CONSUMER_GROUPS == 4 ? 64 : TOKENS == 256 ? 40 : 72;
constexpr int CONSUMER_REGISTERS = CONSUMER_GROUPS == 4 ? 104 : TOKENS == 256 ? 232 : 216;

constexpr bool ROOMY = LARGE && CONSUMER_GROUPS <= 2;

constexpr int VISITS = STAGE_BLOCKS / K_GROUPS;  // blocks of a stage that one warpgroup multiplies
static_assert(STAGE_BLOCKS % K_GROUPS == 0 && (VISITS == 1 || VISITS == 2), "a warpgroup takes one or two blocks per stage");

constexpr int PLANE_BYTES = TOKENS * 128;              // 128 bytes of each token: what one swizzled operand is wide
constexpr int OPERAND_BYTES = PLANES * PLANE_BYTES;    // activations of one block
constexpr bool TAKES_OUTLIERS = PLANES == 1 && SUMMED_BLOCKS == 0;  // they are INT8, as the body's operands must be then
constexpr int STAGE_BYTES = (STAGE_BLOCKS * (OPERAND_BYTES + ROW_GROUPS * WEIGHT_BYTES) + 1023) / 1024 * 1024;
static_assert(ROW_GROUPS * INT8_BLOCK_BYTES <= STAGE_BYTES, "a stage must hold the outlier weights of the tile");
constexpr int EXCHANGE_BYTES = (K_GROUPS - 1) * ROW_GROUPS * BLOCK_ROWS * TOKENS * 4;
// Tokens that are finished together: of the outlier MMA, whose two accumulators must fit beside the body's, and of the store.
constexpr int STORE_TOKENS = min_of(TOKENS, ROOMY && CLUSTER == 1 ? 32 : 16);
constexpr int STORE_PITCH = BLOCK_ROWS * 2 + 16;  // of a token's channels; 16 more keep stmatrix free of bank conflicts
constexpr int STORE_BYTES = ROW_GROUPS * 2 * STORE_TOKENS * STORE_PITCH;
constexpr int STORE_BARRIER = 8;  // the first of ROW_GROUPS named barriers; the exchange has those before it
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + EXCHANGE_BYTES + STORE_BYTES;  // 1024: to align the ring


struct Problem {
    const uint8* weights;           // [row group of 64][block][WEIGHT_BYTES]
    const uint8* outlier_weights;   // [row group][INT8_BLOCK_BYTES], or null
    const uint8* activations;       // [block, the outliers' last][plane][padded_tokens][128 bytes], swizzled
    const float* row_scale;         // [row groups * 64]
    const float* outlier_row_scale;
    const float* token_scale;       // [padded_tokens]
    const float* outlier_token_scale;
    const float* bias;              // [rows], or null
    uint16* output;                 // [tokens][rows]
    Sum4* partials;                 // one tile for each block of the grid
    int* flags;                     // one for each warp that owns rows, zero between launches
    const int* expert_starts;       // [EXPERTS + 1], where each expert's tokens begin
    int rows, tokens, padded_tokens, blocks, row_tiles, token_tiles, split_tiles;  // with experts: split all or none

    // Of a tile: its blocks, the outliers' weights, and what finishing takes: the outliers' activations and all scales.
    INLINE int units() const { return blocks + (outlier_weights ? 2 : 1); }
};

// The producer's and each consumer's place in the ring.
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

enum Scales { TOKEN, OUTLIER_TOKEN, ROW, OUTLIER_ROW };

struct Ring {
    uint8* stages;
    uint64 *full, *empty;

    INLINE uint8* activations(int stage, int block = 0) const { return plane(stage, block * PLANES); }
    INLINE uint8* plane(int stage, int index) const { return stages + stage * STAGE_BYTES + index * PLANE_BYTES; }
    INLINE uint8* weights(int stage, int row_group, int block) const {
        return stages + stage * STAGE_BYTES + STAGE_BLOCKS * OPERAND_BYTES + (row_group * STAGE_BLOCKS + block) * WEIGHT_BYTES;
    }
    // A finishing stage holds the outliers' activations and these, one behind the other.
    INLINE float* scales(int stage, Scales kind) const {
        constexpr int OFFSETS[4] = {0, TOKENS, 2 * TOKENS, 2 * TOKENS + ROW_GROUPS * BLOCK_ROWS};
        return reinterpret_cast<float*>(weights(stage, 0, 0)) + OFFSETS[kind];
    }
    INLINE void wait_full(RingPosition at) const { barrier_wait(full[at.stage], at.parity); }
    INLINE void wait_empty(RingPosition at) const { barrier_wait(empty[at.stage], at.parity ^ 1); }

    // One arrival per warp, after all its lanes have read, at every block of the cluster: each writes this stage in all.
    INLINE void release(int stage, int lane) const {
        __syncwarp();
        if (CLUSTER == 1) {
            if (lane == 0) barrier_arrive(empty[stage]);
        } else if (lane < CLUSTER) {
            barrier_arrive_remote(empty[stage], lane);
        }
    }
};

// The tiles of the experts, those of one expert behind each other: found by all threads of the block together.
struct ExpertTiles {
    int* start;       // [EXPERTS + 1] tokens
    int* first_tile;  // [EXPERTS + 1]

    static INLINE int windows(int first, int last) { return first == last ? 0 : (last - first / 8 * 8 + TOKENS - 1) / TOKENS; }

    INLINE void count(const Problem& problem) const {
        wait_for_previous_kernel();
        for (int i = threadIdx.x; i <= EXPERTS; i += THREADS) start[i] = problem.expert_starts[i];
        __syncthreads();
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            int before = 0;
            for (int base = 0; base <= EXPERTS; base += 32) {
                const int expert = base + lane;
                const int own = expert < EXPERTS ? windows(start[expert], start[expert + 1]) * problem.row_tiles : 0;
                int sum = own;
                for (int distance = 1; distance < 32; distance *= 2) {
                    const int other = __shfl_up_sync(~0u, sum, distance);
                    if (lane >= distance) sum += other;
                }
                if (expert <= EXPERTS) first_tile[expert] = before + sum - own;
                before += __shfl_sync(~0u, sum, 31);
            }
        }
        __syncthreads();
    }

    // The last expert whose tiles begin at or before this one: it has some.
    INLINE int find(int tile) const {
        int low = 0, high = EXPERTS;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (first_tile[middle] <= tile) low = middle;
            else high = middle;
        }
        return low;
    }
};

// Where a tile begins, in the output and in the weights, and which tokens are its own. The copies of activations keep
// to whole swizzle atoms of 8 tokens: an expert's first tile may begin with the last tokens of the expert before it.
struct Corner {
    int row_group, token, weight_group, first_token, last_token;
};

// Where this block stands: its cluster takes CLUSTER neighbouring row tiles of the same tokens.
struct Place {
    const Problem& problem;
    const ExpertTiles& experts;
    int rank, cluster, clusters;

    INLINE Place(const Problem& problem, const ExpertTiles& experts)
        : problem(problem), experts(experts), rank(CLUSTER > 1 ? cluster_rank() : 0), cluster(blockIdx.x / CLUSTER),
          clusters(gridDim.x / CLUSTER) {}

    INLINE int tiles() const { return EXPERTS ? experts.first_tile[EXPERTS] : (problem.row_tiles / CLUSTER) * problem.token_tiles; }
    INLINE int split_tiles() const { return EXPERTS && problem.split_tiles ? tiles() : problem.split_tiles; }
    INLINE Schedule schedule() const { return Schedule(tiles(), split_tiles(), problem.units(), cluster, clusters); }

    INLINE Corner corner(int tile) const {
        if (EXPERTS) {
            const int expert = experts.find(tile), first = experts.start[expert], last = experts.start[expert + 1];
            const int windows = ExpertTiles::windows(first, last), local = tile - experts.first_tile[expert];
            const int column = local / windows, token = first / 8 * 8 + (local - column * windows) * TOKENS;
            return {column * ROW_GROUPS, token, (expert * problem.row_tiles + column) * ROW_GROUPS, first, last};
        }
        const int column = tile / problem.token_tiles, group = (column * CLUSTER + rank) * ROW_GROUPS;
        return {group, (tile - column * problem.token_tiles) * TOKENS, group, 0, problem.tokens};
    }
};
