// Y (tokens, rows) = X W^T on integers, for sm_90a: warpgroup MMAs take weights from registers, where they were
// unpacked, and activations from shared memory, where bulk copies put them.
//
// Weights are the A operand: a tile is ROW_GROUPS x 64 output channels by TOKENS tokens. Two warps are
// producers: they feed a ring of STAGES, each with STAGE_BLOCKS blocks of 128 channels of both operands. The consumer
// warpgroups share a stage: ROW_GROUPS of them by rows, times K_GROUPS by blocks. Integers are summed exactly and in
// any order, so however a tile's channels are split, the result is the same to the last bit.
//
// With EXPERTS the weights are those of so many experts under each other, and the tokens are sorted by the expert that
// each of them takes. How many there are of each is known on the device alone: tiles are counted there.
//
// The including file defines what a block of weights is: WEIGHT_BYTES and unpack(fragment, block, thread).
#pragma once
#include "load.cuh"
#include "mma.cuh"
#include "promote.cuh"
#include "schedule.cuh"
#include "store.cuh"
#include "unpack.cuh"

// TOKENS, ROW_GROUPS, K_GROUPS, STAGES, STAGE_BLOCKS, CLUSTER, BLOCKS_PER_SM, FRAGMENTS, EXPERTS and OUTPUT come from
// the compiler's command line. With two FRAGMENTS a warpgroup unpacks its next block while the MMAs of the last one run.
__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
constexpr int WARPGROUP = 128;
constexpr int CONSUMER_GROUPS = ROW_GROUPS * K_GROUPS;
constexpr bool LARGE = BLOCKS_PER_SM == 1;  // registers move from a producer warpgroup to the consumers
constexpr int THREADS = CONSUMER_GROUPS * WARPGROUP + (LARGE ? WARPGROUP : 64);
constexpr int PRODUCER_REGISTERS = CONSUMER_GROUPS == 4 ? 64 : TOKENS == 256 ? 40 : 72;
constexpr int CONSUMER_REGISTERS = CONSUMER_GROUPS == 4 ? 104 : TOKENS == 256 ? 232 : 216;

constexpr bool ROOMY = LARGE && CONSUMER_GROUPS <= 2;

constexpr int VISITS = STAGE_BLOCKS / K_GROUPS;  // blocks of a stage that one warpgroup multiplies
static_assert(STAGE_BLOCKS % K_GROUPS == 0 && (VISITS == 1 || VISITS == 2), "a warpgroup takes one or two blocks per stage");

constexpr int OPERAND_BYTES = TOKENS * BLOCK_K;  // activations of one block
constexpr int STAGE_BYTES = (STAGE_BLOCKS * (OPERAND_BYTES + ROW_GROUPS * WEIGHT_BYTES) + 1023) / 1024 * 1024;
static_assert(ROW_GROUPS * INT8_BLOCK_BYTES <= STAGE_BYTES, "a stage must hold the outlier weights of the tile");
constexpr int EXCHANGE_BYTES = (K_GROUPS - 1) * ROW_GROUPS * BLOCK_ROWS * TOKENS * 4;
// Tokens that are finished together: of the outlier MMA, whose two accumulators must fit beside the body's, and of the store.
constexpr int STORE_TOKENS = min_of(TOKENS, ROOMY && CLUSTER == 1 ? 32 : 16);
constexpr int STORE_PITCH = 48;  // 16 channels are 32 bytes; 48 keep stmatrix and the reads back free of bank conflicts
constexpr int STORE_BYTES = ROW_GROUPS * 4 * STORE_TOKENS * STORE_PITCH;
constexpr int SHARED_BYTES = 1024 + STAGES * STAGE_BYTES + EXCHANGE_BYTES + STORE_BYTES;  // 1024: to align the ring


struct Problem {
    const uint8* weights;           // [row group of 64][block][WEIGHT_BYTES]
    const uint8* outlier_weights;   // [row group][INT8_BLOCK_BYTES], or null
    const uint8* activations;       // [block, the outliers' last][padded_tokens][128], swizzled
    const float* row_scale;         // [row groups * 64]
    const float* outlier_row_scale;
    const float* token_scale;       // [padded_tokens]
    const float* outlier_token_scale;
    const float* bias;              // [rows], or null
    uint16* output;                 // [tokens][rows]
    int4* partials;                 // one tile for each block of the grid
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

    INLINE uint8* activations(int stage, int block = 0) const { return stages + stage * STAGE_BYTES + block * OPERAND_BYTES; }
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

// ---------------------------------------------------------------------------------------------------- producer

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
    const long long block_bytes = static_cast<long long>(problem.padded_tokens) * BLOCK_K;
    const bool outliers = problem.outlier_weights;
    const uint8* source = nullptr;
    int tokens = 0;  // of the tile that exist
    bool entered;
    RingPosition at;
    wait_for_previous_kernel();
#pragma unroll 1
    for (Walk walk(problem, place); walk.next(entered); walk.advance(), at.advance()) {
        if (entered) {
            source = problem.activations + walk.unit * block_bytes + walk.corner.token * BLOCK_K;
            const int end = EXPERTS ? (walk.corner.last_token + 7) / 8 * 8 : problem.padded_tokens;
            tokens = min(TOKENS, end - walk.corner.token);
        }
        ring.wait_empty(at);
        uint64& full = ring.full[at.stage];
        int operand = walk.count * tokens * BLOCK_K;
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
            const int offset = place.rank * SHARE * BLOCK_K, bytes = min(SHARE, tokens - place.rank * SHARE) * BLOCK_K;
            for (int block = 0; block < walk.count && bytes > 0; ++block, source += block_bytes)
                bulk_copy_multicast(ring.activations(at.stage, block) + offset, source + offset, bytes, full, (1 << CLUSTER) - 1, policy);
        } else if (problem.padded_tokens == TOKENS && tokens == TOKENS) {  // then blocks follow each other without a gap
            bulk_copy(ring.activations(at.stage), source, operand, full, policy);
            source += operand;
        } else {
            for (int block = 0; block < walk.count; ++block, source += block_bytes)
                bulk_copy(ring.activations(at.stage, block), source, tokens * BLOCK_K, full, policy);
        }
    }
}

// ---------------------------------------------------------------------------------------------------- consumers

struct Consumer {
    const Problem& problem;
    const Place place;
    const Ring ring;
    int4* exchange;    // sums of the other K groups
    uint8* staging;    // this warp's output on its way from registers to memory
    const int group, row_group, k_group, thread, warp, lane;
    RingPosition at;

    using Sums = int[TOKENS / 2];

    INLINE Consumer(const Problem& problem, const Place& place, const Ring& ring, uint8* shared, int group)
        : problem(problem), place(place), ring(ring), exchange(reinterpret_cast<int4*>(shared)), group(group),
          row_group(group % ROW_GROUPS), k_group(group / ROW_GROUPS), thread(threadIdx.x % WARPGROUP),
          warp(thread / 32), lane(thread % 32) {
        staging = shared + EXCHANGE_BYTES + (row_group * 4 + warp) * STORE_TOKENS * STORE_PITCH;
    }

    INLINE void multiply(Sums& sums, WeightFragment& fragment, int block) {
        unpack(fragment, ring.weights(at.stage, row_group, block), thread);
        const uint64 operand = operand_descriptor(ring.activations(at.stage, block));
        mma_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) mma(sums, fragment.step[step], operand + step * DESCRIPTOR_K32);
        mma_commit();
    }

    // Adds this warpgroup's share of `blocks` blocks. With two fragments one batch of MMAs stays in flight while the
    // next block is unpacked; a stage is given back when nothing that reads it is in flight. The assembler follows
    // MMAs in flight only through straight code: stages that are not full come last, one at a time.
    INLINE void multiply_blocks(Sums& sums, int blocks) {
        constexpr int TOGETHER = FRAGMENTS > VISITS ? FRAGMENTS / VISITS : 1;  // stages, so that fragments have constant indices
        WeightFragment fragments[FRAGMENTS];
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

    // Sums of the other K groups come to the first one through shared memory.
    INLINE void reduce_k_groups(Sums& sums) {
        constexpr int WARP_SUMS = TOKENS / 8 * 32;  // int4 of one warp
        constexpr int MEMBERS = K_GROUPS * WARPGROUP;
        const auto of = [&](int other) { return exchange + (((other - 1) * ROW_GROUPS + row_group) * 4 + warp) * WARP_SUMS; };
        named_barrier_sync(1 + row_group, MEMBERS);  // the last segment's sums have been read
        if (k_group > 0) store_partial(of(k_group), sums, lane);
        named_barrier_sync(1 + row_group, MEMBERS);  // this one's have been written
        if (k_group > 0) return;
        for (int other = 1; other < K_GROUPS; ++other) add_partial(sums, of(other), lane);
    }

    INLINE int4* partial(int block) const { return problem.partials + ((block * ROW_GROUPS + row_group) * 4 + warp) * (TOKENS / 8 * 32); }
    INLINE int* flag(int block) const { return problem.flags + (block * ROW_GROUPS + row_group) * 4 + warp; }

    // Warps exchange with the same warp of the other block: no barrier is wider than a warp.
    INLINE void give(const Sums& sums) const {
        store_partial(partial(blockIdx.x), sums, lane);
        __syncwarp();
        if (lane == 0) raise_flag(flag(blockIdx.x));
    }

    // Adds what the clusters before this one have summed of the tile whose first unit is `tile_begin`.
    INLINE void take(Sums& sums, int tile_begin) const {
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
        const int first_row = (corner.row_group + row_group) * BLOCK_ROWS + warp * 16;
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
            const bool biased = problem.bias && first_row + lane / 4 + 8 * half < problem.rows;
            bias[half] = biased ? problem.bias[first_row + lane / 4 + 8 * half] : 0.f;
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
                        matrix[2 * i + half] = OUTPUT::pack(low, high);
                    }
                }
                store_matrices(staging + ((column + lane / 16 % TOGETHER) * 8 + lane % 8) * STORE_PITCH + lane / 8 % 2 * 16, matrix);
            }
            __syncwarp();
            store_rows(first_row, corner.token + chunk, corner);
            __syncwarp();
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

    // This warp's 16 channels of STORE_TOKENS tokens: two lanes to a token, 16 bytes each.
    INLINE void store_rows(int first_row, int first_token, const Corner& corner) const {
        const int row = first_row + lane % 2 * 8;
        const int channels = min(8, problem.rows - row);
        const uint8* source = staging + lane / 2 * STORE_PITCH + lane % 2 * 16;
        uint16* destination = problem.output + static_cast<long long>(first_token + lane / 2) * problem.rows + row;
        const int rest = channels > 0 ? corner.last_token - first_token - lane / 2 : 0;
        const int others = EXPERTS ? corner.first_token - first_token - lane / 2 : 0;
#pragma unroll
        for (int i = 0; i < STORE_TOKENS; i += 16, source += 16 * STORE_PITCH, destination += 16 * problem.rows) {
            if (i < others || i >= rest || STORE_TOKENS < 16 && lane / 2 >= STORE_TOKENS) continue;
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
            if (problem.outlier_weights) finish<true>(sums, segment);
            else finish<false>(sums, segment);
        }
    }
};

// ---------------------------------------------------------------------------------------------------- the kernel

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, BLOCKS_PER_SM)
gemm(const uint8* weights, const uint8* outlier_weights, const uint8* activations, const float* row_scale,
     const float* outlier_row_scale, const float* token_scale, const float* outlier_token_scale, const float* bias,
     uint16* output, int4* partials, int* flags, const int* expert_starts, int rows, int tokens, int padded_tokens, int blocks, int row_tiles,
     int token_tiles, int split_tiles) {
    extern __shared__ uint8 memory[];
    __shared__ uint64 full[STAGES], empty[STAGES];
    __shared__ int expert_table[2][EXPERTS + 1];
    // An offset, not a rounded pointer: a pointer that went through an integer is no longer known to be shared.
    uint8* shared = memory + (1024 - shared_address(memory) % 1024) % 1024;
    const Problem problem{weights, outlier_weights, activations, row_scale, outlier_row_scale, token_scale, outlier_token_scale,
                          bias, output, partials, flags, expert_starts, rows, tokens, padded_tokens, blocks, row_tiles, token_tiles, split_tiles};
    const ExpertTiles experts{expert_table[0], expert_table[1]};
    const Place place(problem, experts);
    const Ring ring{shared, full, empty};
    const int group = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0);  // the same in a warp, and known to be

    allow_next_kernel();
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(full[stage], 2);
            barrier_init(empty[stage], CONSUMER_GROUPS * 4 * CLUSTER);
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();
    if (EXPERTS) experts.count(problem);

    if (group == CONSUMER_GROUPS) {
        if (LARGE) give_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x == CONSUMER_GROUPS * WARPGROUP) produce_weights(problem, place, ring);
        if (threadIdx.x == CONSUMER_GROUPS * WARPGROUP + 32) produce_activations(problem, place, ring);
    } else {
        if (LARGE) take_registers<CONSUMER_REGISTERS>();
        Consumer(problem, place, ring, shared + STAGES * STAGE_BYTES, group).run();
    }
    if (CLUSTER > 1) cluster_sync();  // a block must not end while another one still copies to it
}
