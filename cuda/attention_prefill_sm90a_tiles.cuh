// Prefill attention on sm_90a: its parameters, and what lies in shared memory.
//
// A block serves ROWS pairs of a query and a head that share a KV head. Two warpgroups of producers, one for keys and one for
// values, read pages, turn codes into 16-bit floats once for all rows, and leave them as tiles of TILE tokens in a ring of
// STAGES; two warpgroups of consumers multiply, with 64 rows each. Blocks stay on their SM and take work as they get free, so
// that producers are ahead of consumers where work changes, too.
#pragma once
#include "attention_restore.cuh"
#include "attention_work.cuh"
#include "mma_half.cuh"

// STAGES and QUERY come from the compiler's command line.
using Query = QUERY;  // bf16 or fp16
template <class> struct PairsOf { using Type = Float16Pairs; };
template <> struct PairsOf<bf16> { using Type = Bfloat16Pairs; };
using OutputPairs = PairsOf<Query>::Type;

constexpr int TILE = 64;
constexpr int WARPGROUP = 128, GROUPS = 2, ROWS = GROUPS * 64;
constexpr int THREADS = (GROUPS + 2) * WARPGROUP;
constexpr int SIDE_WARPS = WARPGROUP / 32;

// With up to 128 channels the queries, two tiles' scores and the sums are in registers; 256 leave room for the sums and one
// tile's scores.
constexpr bool ROOMY = head_dim <= 128;
constexpr int CONSUMER_REGISTERS = ROOMY ? 176 : 192, PRODUCER_REGISTERS = ROOMY ? 80 : 64;

template <Element> struct WarpgroupOf { using Type = Float16Warpgroup; };
template <> struct WarpgroupOf<BF16> { using Type = Bfloat16Warpgroup; };
using Warpgroup = WarpgroupOf<element>::Type;

constexpr int SWIZZLE = head_dim % 64 == 0 ? 128 : 64;  // bytes of a block of channels
constexpr int CHANNEL_STEPS = head_dim / 16, TOKEN_STEPS = TILE / 16;
constexpr int SUM_CHANNELS = head_dim > 128 ? 128 : head_dim, SUM_PARTS = head_dim / SUM_CHANNELS;  // of one MMA's sums

// A producer warp brings its own rows of each tile of its side. Its lanes read pieces of 16 bytes of codes, eight rows at a
// time, so that eight lanes with neighbouring rows write to different banks.
constexpr int WARP_ROWS = TILE / SIDE_WARPS;
constexpr int ROW_PIECES = row_bytes / 16;
constexpr int LANE_PIECES = (WARP_ROWS / 8 * ROW_PIECES + 3) / 4;
constexpr int PAGE_ROWS = page_tokens < WARP_ROWS ? page_tokens : WARP_ROWS, WARP_PAGES = WARP_ROWS / PAGE_ROWS;

// Results leave through shared memory, 32 channels at a time.
constexpr int STORE_CHANNELS = 32, STORE_PITCH = STORE_CHANNELS * 2 + 16;

constexpr int BARRIER_BYTES = 1024;
constexpr int QUERY_BYTES = ROWS * head_dim * 2;
constexpr int SIDE_BYTES = TILE * head_dim * 2;  // keys or values of a stage
constexpr int STORE_BYTES = ROOMY ? GROUPS * 4 * 16 * STORE_PITCH : 0;  // or in the queries' place
static_assert(ROOMY || STORE_PITCH <= SWIZZLE, "a warp's results fit where its queries were");

// Where piece `piece` of 16 bytes of row `row` lies in a tile of ROWS rows.
template <int SWIZZLE, int ROWS> INLINE uint32 swizzled_offset(uint32 row, uint32 piece) {
    constexpr int PIECES = SWIZZLE / 16, SHARE = 128 / SWIZZLE;  // rows that share a line of all banks
    return piece / PIECES * ROWS * SWIZZLE + row * SWIZZLE + (piece % PIECES ^ row / SHARE % PIECES) * 16;
}

enum Side { KEYS, VALUES };

struct Problem {
    const Query* query;       // (tokens, heads, head_dim), tokens query_stride apart
    const uint8* pool;        // (pages, kv_heads, page_bytes)
    const int* page_table;    // (sequences, max_pages)
    const int* query_starts;  // (sequences + 1)
    const int* lengths;       // (sequences)
    const float* value_bias;  // (kv_heads, head_dim), or null
    Query* out;               // (tokens, heads, head_dim)
    int* counters;            // work taken beyond the first of each block, and blocks that are done; zero between launches
    int sequences, heads, kv_heads, max_pages, query_stride, window, blocks;
    float slope;              // of scores, in base 2

    INLINE int group() const { return heads / kv_heads; }
    INLINE int block_queries() const { return ROWS / group(); }
    INLINE Columns rows(const Work& work) const { return {work, group(), block_queries()}; }
    INLINE Range range(const Work& work) const {
        const int last = min(work.first + block_queries(), work.queries) - 1;
        return {max(0, work.position(work.first) - window + 1), work.position(last) + 1};
    }
};

// A block's work: some queries of a sequence, and a KV head; no sequence at the end.
struct Item {
    Work work;
    int kv_head;
};

// A place in a ring of COUNT, and the parity of its barriers.
template <int COUNT> struct RingPosition {
    int stage = 0;
    uint32 parity = 0;

    INLINE void advance() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};
using Stage = RingPosition<STAGES>;
constexpr int ITEMS_AHEAD = 2;  // items that the keys' producers may be ahead of the values'
using ItemPlace = RingPosition<ITEMS_AHEAD>;

struct Shared {
    uint8* base;

    // Barriers, the ones behind the others.
    enum Barriers { FULL = 0, EMPTY = 2 * STAGES, QUERIES_FULL = 4 * STAGES, QUERIES_EMPTY, ITEM_FULL, ITEM_EMPTY = ITEM_FULL + ITEMS_AHEAD,
                    COUNT = ITEM_EMPTY + ITEMS_AHEAD };
    static_assert(COUNT * 8 <= 512 && 512 + (ITEMS_AHEAD + 1) * sizeof(Item) <= BARRIER_BYTES, "barriers and items fit");

    INLINE uint64& barrier(int index) const { return reinterpret_cast<uint64*>(base)[index]; }
    INLINE uint64& full(Side side, int stage) const { return barrier(FULL + side * STAGES + stage); }
    INLINE uint64& empty(Side side, int stage) const { return barrier(EMPTY + side * STAGES + stage); }
    INLINE Item& item(int place) const { return reinterpret_cast<Item*>(base + 512)[place]; }  // for producers
    INLINE Item& queries_item() const { return item(ITEMS_AHEAD); }                            // for consumers
    INLINE uint8* queries() const { return base + BARRIER_BYTES; }
    INLINE uint8* tile(Side side, int stage) const { return queries() + QUERY_BYTES + (side * STAGES + stage) * SIDE_BYTES; }
    INLINE uint8* store(int warp) const { return ROOMY ? tile(KEYS, 2 * STAGES) + warp * 16 * STORE_PITCH : queries() + warp * 16 * SWIZZLE; }

    INLINE void init_barriers() const {
        for (int stage = 0; stage < 2 * STAGES; ++stage) {
            barrier_init(barrier(FULL + stage), SIDE_WARPS);
            barrier_init(barrier(EMPTY + stage), GROUPS * 4);
        }
        barrier_init(barrier(QUERIES_FULL), SIDE_WARPS);
        barrier_init(barrier(QUERIES_EMPTY), GROUPS * 4);
        for (int place = 0; place < ITEMS_AHEAD; ++place) {
            barrier_init(barrier(ITEM_FULL + place), 1);
            barrier_init(barrier(ITEM_EMPTY + place), 2 * SIDE_WARPS);
        }
        barrier_init_fence();
    }
    INLINE void wait_full(Side side, Stage at) const { barrier_wait(full(side, at.stage), at.parity); }
    INLINE void wait_empty(Side side, Stage at) const { barrier_wait(empty(side, at.stage), at.parity ^ 1); }

    // One arrival for a warp, when all its lanes are done.
    static INLINE void arrive(uint64& barrier) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    }
};
