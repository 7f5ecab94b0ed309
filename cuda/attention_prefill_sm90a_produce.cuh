// The producers of prefill attention on sm_90a: pages become tiles, and queries a tile of their own.
#pragma once
#include "attention_prefill_sm90a_tiles.cuh"

template <Side SIDE> struct Producer {
    const Problem& problem;
    const Shared shared;
    const int thread, warp, lane;  // of this side's producers
    Stage at;

    INLINE Producer(const Problem& problem, const Shared& shared)
        : problem(problem), shared(shared), thread(threadIdx.x % WARPGROUP), warp(thread / 32), lane(thread % 32) {}

    INLINE Item take_item(ItemPlace place) const {
        barrier_wait(shared.barrier(Shared::ITEM_FULL + place.stage), place.parity);
        const Item item = shared.item(place.stage);
        Shared::arrive(shared.barrier(Shared::ITEM_EMPTY + place.stage));
        return item;
    }

    // --------------------------------------------------------------------------------------------- queries

    // A piece of a row in the order in which restored keys have their channels, as the MMA's numbers.
    static INLINE uint4 operand_piece(const uint4& piece) {
        const uint32 words[4] = {piece.x, piece.y, piece.z, piece.w};
        auto channel = [&](int i) { return to_float(Query{static_cast<uint16>(words[i / 2] >> (i % 2 * 16))}); };
        uint32 pairs[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) pairs[p] = Operand::of(channel(channel_at(2 * p)), channel(channel_at(2 * p + 1)));
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }

    // A warp brings its share of the rows; those without a query are zero.
    INLINE void load_queries(const Item& item) const {
        constexpr int SHARE = ROWS / SIDE_WARPS, PIECES = head_dim / 8, TOGETHER = 4;  // loads in flight of a lane
        const Columns rows = problem.rows(item.work);
        const int own = warp * SHARE + lane % SHARE, number = rows.query(own);
        const long long place = static_cast<long long>(item.work.start + number) * problem.query_stride + (item.kv_head * rows.group + rows.head(own)) * head_dim;
        const uint64 own_row = number < 0 ? 0 : reinterpret_cast<uint64>(problem.query + place);
#pragma unroll 1
        for (int base = 0; base < SHARE * PIECES; base += TOGETHER * 32) {
            uint4 pieces[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const uint32 at = base + i * 32 + lane;
                const uint64 row = __shfl_sync(~0u, own_row, at / PIECES);
                pieces[i] = row ? reinterpret_cast<const uint4*>(row)[at % PIECES] : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const uint32 at = base + i * 32 + lane;
                *reinterpret_cast<uint4*>(shared.queries() + swizzled_offset<SWIZZLE, ROWS>(warp * SHARE + at / PIECES, at % PIECES)) = operand_piece(pieces[i]);
            }
        }
    }

    // -------------------------------------------------------------------------------------- keys and values

    // The keys or values of an item.
    struct Pages {
        const int* table;
        const uint8* pool;  // of the KV head
        uint32 stride;
        Range range;
        int first, tiles;  // the position of the first tile's first token
    };

    INLINE Pages pages_of(const Item& item) const {
        const Range range = problem.range(item.work);
        const int first = range.first / TILE * TILE;
        return {problem.page_table + static_cast<long long>(item.work.sequence) * problem.max_pages,
                problem.pool + static_cast<long long>(item.kv_head) * page_bytes + SIDE * page_tokens * row_bytes,
                static_cast<uint32>(problem.kv_heads) * page_bytes, range, first, max(0, (range.end - first + TILE - 1) / TILE)};
    }

    struct PageNumbers {
        uint32 of[WARP_PAGES];
    };

    // The pages of this warp's rows of a tile; any page where none of their tokens is in range.
    INLINE PageNumbers find_pages(const Pages& pages, int tile) const {
        PageNumbers numbers;
#pragma unroll
        for (int p = 0; p < WARP_PAGES; ++p) {
            const int first = pages.first + tile * TILE + warp * WARP_ROWS + p * PAGE_ROWS;
            const bool exists = first < pages.range.end && first + PAGE_ROWS > pages.range.first;
            numbers.of[p] = exists ? pages.table[static_cast<uint32>(first) / page_tokens] : 0;
        }
        return numbers;
    }

    // A lane's pieces: number `index` is piece number piece(index) of row row(index). Where a warp reads whole rows at once,
    // that is the same number further from the first for all lanes.
    static constexpr int TOGETHER = ROW_PIECES < 4 ? ROW_PIECES : 4;
    static constexpr bool EVENLY = 4 % TOGETHER == 0 && ROW_PIECES % TOGETHER == 0;
    static constexpr INLINE uint32 rows_further(uint32 index) { return index / (ROW_PIECES / TOGETHER) * (4 / TOGETHER) * 8; }
    static constexpr INLINE uint32 pieces_further(uint32 index) { return index % (ROW_PIECES / TOGETHER) * TOGETHER; }
    INLINE uint32 row(uint32 index) const {
        if constexpr (EVENLY) return lane / 8u / TOGETHER * 8 + lane % 8u + rows_further(index);
        else return (index * 4 + lane / 8u) / ROW_PIECES * 8 + lane % 8u;
    }
    INLINE uint32 piece(uint32 index) const {
        if constexpr (EVENLY) return lane / 8u % TOGETHER + pieces_further(index);
        else return (index * 4 + lane / 8u) % ROW_PIECES;
    }

    // This warp's rows of a tile, in memory.
    struct Source {
        const uint8 *codes[WARP_PAGES], *numbers[WARP_PAGES];  // of the first row, if all were in this page
        uint32 skipped, visible;

        INLINE bool inside(uint32 row) const { return skipped + row < visible && row < WARP_ROWS; }
        static INLINE int page(uint32 row) { return WARP_PAGES == 2 && row >= PAGE_ROWS; }
    };

    INLINE Source source(const Pages& pages, const PageNumbers& numbers, int tile) const {
        const uint32 first = pages.first + tile * TILE + warp * WARP_ROWS;
        Source rows;
#pragma unroll
        for (int p = 0; p < WARP_PAGES; ++p) {
            const uint8* page = pages.pool + static_cast<uint64>(numbers.of[p]) * pages.stride;
            const int row = static_cast<int>((first + p * PAGE_ROWS) % page_tokens) - p * PAGE_ROWS;
            rows.codes[p] = page + row * row_bytes;
            rows.numbers[p] = page + (2 - SIDE) * page_tokens * row_bytes + row * number_bytes + (number_bytes == 8 ? SIDE * 4 : 0);
        }
        rows.skipped = first - pages.range.first;
        rows.visible = pages.range.end - pages.range.first;
        return rows;
    }

    // What is the same for all lanes is added last: the instruction adds it.
    INLINE const uint8* code_place(const Source& rows, int index) const {
        const int first = EVENLY ? 0 : index;
        const uint8* page = WARP_PAGES == 2 && Source::page(row(index)) ? rows.codes[WARP_PAGES - 1] : rows.codes[0];
        page += row(first) * row_bytes + piece(first) * 16;
        return page + (EVENLY ? rows_further(index) * row_bytes + pieces_further(index) * 16 : 0);
    }

    // Tokens out of range are zeros.
    INLINE uint4 load_codes(const Source& rows, int index) const {
        return rows.inside(row(index)) ? *reinterpret_cast<const uint4*>(code_place(rows, index)) : make_uint4(0, 0, 0, 0);
    }

    // The numbers of a lane's rows, of which it has as many pieces as are read one after the other.
    static constexpr int ROWS_OF_LANE = ROW_PIECES % 4 ? LANE_PIECES : WARP_ROWS / 8, PIECES_OF_ROW = LANE_PIECES / ROWS_OF_LANE;

    INLINE uint32 load_numbers(const Source& rows, int index) const {
        const uint32 own = row(index);
        const uint8* from = (WARP_PAGES == 2 && Source::page(own) ? rows.numbers[WARP_PAGES - 1] : rows.numbers[0]) + own * number_bytes;
        return rows.inside(own) ? *reinterpret_cast<const uint32*>(from) : 0;
    }

    // Where 16 bytes of a tile made of a lane's piece go.
    INLINE uint8* tile_place(int index, int part) const {
        constexpr int PARTS = 4 / piece_words, BLOCK = SWIZZLE / 16;
        uint8* tile = shared.tile(SIDE, at.stage);
        if constexpr (EVENLY && (ROW_PIECES == TOGETHER || TOGETHER * PARTS % BLOCK == 0)) {
            tile += swizzled_offset<SWIZZLE, TILE>(warp * WARP_ROWS + row(0), piece(0) * PARTS + part);
            return tile + rows_further(index) * SWIZZLE + pieces_further(index) * PARTS / BLOCK * TILE * SWIZZLE;
        } else {
            return tile + swizzled_offset<SWIZZLE, TILE>(warp * WARP_ROWS + row(index), piece(index) * PARTS + part);
        }
    }

    INLINE void restore(const uint4& codes, uint32 numbers, int index) const {
        const Restore values(numbers, SIDE == VALUES);
        const uint32 words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int part = 0; part < 4 / piece_words; ++part)
            if (EVENLY || row(index) < WARP_ROWS) *reinterpret_cast<uint4*>(tile_place(index, part)) = values.piece(words + part * piece_words);
    }

    // What a warp has of the tile to come, and the pages of the one behind it.
    struct Fetched {
        uint4 codes[LANE_PIECES];
        uint32 numbers[ROWS_OF_LANE];
        PageNumbers pages;

        INLINE void load(const Producer& producer, const Source& rows, int index) {
            codes[index] = producer.load_codes(rows, index);
            if (index % PIECES_OF_ROW == PIECES_OF_ROW - 1) numbers[index / PIECES_OF_ROW] = producer.load_numbers(rows, index);
        }
    };

    INLINE void fetch_first(Fetched& fetched, const Pages& pages) const {
        const Source rows = source(pages, find_pages(pages, 0), 0);
        fetched.pages = find_pages(pages, 1);
#pragma unroll
        for (int i = 0; i < LANE_PIECES; ++i) fetched.load(*this, rows, i);
    }

    // Codes that have been restored make room for those of the next tile. `between` is done after the first.
    template <class Between> INLINE void produce_restored(const Pages& pages, Fetched& fetched, Between between) {
#pragma unroll 1
        for (int tile = 0; tile < pages.tiles; ++tile, at.advance()) {
            const Source next = source(pages, fetched.pages, tile + 1);
            fetched.pages = find_pages(pages, tile + 2);
            shared.wait_empty(SIDE, at);
#pragma unroll
            for (int i = 0; i < LANE_PIECES; ++i) {
                restore(fetched.codes[i], fetched.numbers[i / PIECES_OF_ROW], i);
                fetched.load(*this, next, i);
            }
            fence_shared_for_mma();
            Shared::arrive(shared.full(SIDE, at.stage));
            if (tile == 0) between();
        }
    }

    // bf16 needs no restoring: it is copied into the tile, and the tile is told to be there after the next one has begun.
    template <class Between> INLINE void produce_copied(const Pages& pages, Between between) {
        PageNumbers numbers = find_pages(pages, 0);
        int before = 0;
#pragma unroll 1
        for (int tile = 0; tile <= pages.tiles; ++tile) {
            const int here = at.stage;
            if (tile < pages.tiles) {
                const Source rows = source(pages, numbers, tile);
                numbers = find_pages(pages, tile + 1);
                shared.wait_empty(SIDE, at);
#pragma unroll
                for (int i = 0; i < LANE_PIECES; ++i)
                    if (EVENLY || row(i) < WARP_ROWS) copy_async(tile_place(i, 0), code_place(rows, i), rows.inside(row(i)));
                at.advance();
            }
            copy_commit();
            copy_wait<1>();
            if (tile > 0) {
                fence_shared_for_mma();
                Shared::arrive(shared.full(SIDE, before));
            }
            before = here;
            if (tile == 0 && pages.tiles > 0) between();
        }
    }

    template <class Between> INLINE void produce(const Item& item, Between between) {
        const Pages pages = pages_of(item);
        if (pages.tiles == 0) between();
        if constexpr (element == BF16) {
            produce_copied(pages, between);
        } else {
            Fetched fetched;
            fetch_first(fetched, pages);
            produce_restored(pages, fetched, between);
        }
    }
};

// The first warp of the keys' producers takes work and tells all producers: the next item while this one's tiles are on
// their way.
struct KeyProducer : Producer<KEYS> {
    ItemPlace next_place;

    using Producer<KEYS>::Producer;

    INLINE Item find_item(int number) const {
        const int block = number / problem.kv_heads;
        if (block >= problem.blocks) return {{-1, 0, 0, 0, 0}, -1};
        // The last queries of a sequence see most: they go first.
        const Work work = find_work(problem.query_starts, problem.lengths, problem.sequences, problem.block_queries(), problem.blocks - 1 - block);
        return {work, number % problem.kv_heads};
    }

    // There may be fewer blocks of queries than counted on: what has no KV head is the end.
    INLINE void tell_item(int number) {
        if (warp != 0) return;
        Item item;
        while (true) {
            item = find_item(number);
            if (item.work.sequence >= 0 || item.kv_head < 0) break;
            number = next_number();
        }
        barrier_wait(shared.barrier(Shared::ITEM_EMPTY + next_place.stage), next_place.parity ^ 1);
        if (lane == 0) {
            shared.item(next_place.stage) = item;
            barrier_arrive(shared.barrier(Shared::ITEM_FULL + next_place.stage));
        }
        next_place.advance();
    }

    INLINE int next_number() const {
        int number = 0;
        if (lane == 0) number = gridDim.x + atomicAdd(problem.counters, 1);
        return __shfl_sync(~0u, number, 0);
    }

    INLINE void run() {
        tell_item(blockIdx.x);
        for (ItemPlace place;; place.advance()) {
            const Item item = take_item(place);
            if (item.work.sequence < 0) break;
            produce(item, [&] {
                if (warp == 0) tell_item(next_number());
            });
        }
        leave();
    }

    // The last block leaves the counters as it found them.
    INLINE void leave() const {
        if (thread != 0) return;
        __threadfence();
        if (atomicAdd(problem.counters + 1, 1) == static_cast<int>(gridDim.x) - 1) problem.counters[0] = problem.counters[1] = 0;
    }
};

// Values' producers bring the queries as well: values are needed later than keys.
struct ValueProducer : Producer<VALUES> {
    using Producer<VALUES>::Producer;

    INLINE void run() {
        uint32 parity = 1;  // of the queries' barrier
        for (ItemPlace place;; place.advance(), parity ^= 1) {
            const Item item = take_item(place);
            const bool end = item.work.sequence < 0;
            barrier_wait(shared.barrier(Shared::QUERIES_EMPTY), parity);
            if (!end) load_queries(item);
            if (thread == 0) shared.queries_item() = item;
            fence_shared_for_mma();
            Shared::arrive(shared.barrier(Shared::QUERIES_FULL));
            if (end) return;
            produce(item, [] {});
        }
    }
};
