// Y (tokens, rows) = X W^T with warp MMAs, for every architecture since sm_80: the skeleton of a kernel.
//
// A block computes ROW_WARPS * ROW_TILES * 16 output channels of TOKEN_WARPS * TOKEN_TILES * 8 tokens. Asynchronous
// copies keep STAGES k-blocks of 128 channels of both operands on their way through shared memory. gridDim.z blocks may
// share the channels of a tile: each leaves its partial sums in memory, the last one to arrive adds them in order, so the
// result does not depend on who was last. The outlier channels, INT8, are that block's own last work.
//
// The including file says what a k-block is and what happens to it, in a struct Body that it writes on top of tile_sm80.cuh:
//   WEIGHT_BYTES, TOKEN_BYTES, SCALE_BYTES      of 64 rows, of one token, of one token's scales
//   Sum, reset(sums), multiply(sums, stage, warp), result(sum, row, token)
#pragma once
#include "tile_sm80.cuh"


constexpr int WEIGHTS_OF_STAGE = ROW_GROUPS * Body::WEIGHT_BYTES;
constexpr int OPERAND_OF_STAGE = TOKENS * Body::TOKEN_BYTES;
constexpr int STAGE_BYTES = (WEIGHTS_OF_STAGE + OPERAND_OF_STAGE + TOKENS * Body::SCALE_BYTES + 127) / 128 * 128;
constexpr int OUTLIER_BYTES = ROW_GROUPS * INT8_BLOCK_BYTES + TOKENS * BLOCK_K;
constexpr int OUTPUT_PITCH = ROWS + 8;  // in elements; 16 bytes more than the row, so that a warp's stores hit all banks
using Sums = Body::Sum[ROW_TILES][TOKEN_TILES][4];

// ---------------------------------------------------------------------------------------------------- load

INLINE void copy_bytes(uint8* destination, const uint8* source, int bytes) {
    for (int at = threadIdx.x * 16; at < bytes; at += THREADS * 16) copy_async(destination + at, source + at);
}

// A row of `bytes` per token; those past the padded tokens read as zero. 16 bytes of short rows are eight tokens at most,
// and padded tokens come in eights.
INLINE void copy_rows(uint8* destination, const uint8* source, int bytes, int first, int padded_tokens) {
    for (int at = threadIdx.x * 16; at < TOKENS * bytes; at += THREADS * 16) {
        const bool inside = first + at / bytes < padded_tokens;
        copy_async(destination + at, inside ? source + static_cast<long long>(first) * bytes + at : source, inside);
    }
}

struct Tile {
    int first_row, first_token, first_block, last_block;
    const Problem& problem;

    INLINE int row_group(int group) const { return min(first_row / BLOCK_ROWS + group, problem.row_groups() - 1); }

    INLINE void load(uint8* stage, int block) const {
        if (block < last_block) {
            const long long rows = static_cast<long long>(block) * problem.padded_tokens;
            for (int group = 0; group < ROW_GROUPS; ++group)
                copy_bytes(stage + group * Body::WEIGHT_BYTES,
                           problem.weights + (static_cast<long long>(row_group(group)) * problem.blocks + block) * Body::WEIGHT_BYTES,
                           Body::WEIGHT_BYTES);
            copy_rows(stage + WEIGHTS_OF_STAGE, problem.activations + rows * Body::TOKEN_BYTES, Body::TOKEN_BYTES, first_token,
                      problem.padded_tokens);
            if constexpr (Body::SCALE_BYTES > 0)
                copy_rows(stage + WEIGHTS_OF_STAGE + OPERAND_OF_STAGE, problem.group_scales + rows * Body::SCALE_BYTES, Body::SCALE_BYTES,
                          first_token, problem.padded_tokens);
        }
        copy_commit();  // an empty group too: groups are counted
    }

    INLINE void load_outliers(uint8* stage) const {
        for (int group = 0; group < ROW_GROUPS; ++group)
            copy_bytes(stage + group * INT8_BLOCK_BYTES, problem.outlier_weights + static_cast<long long>(row_group(group)) * INT8_BLOCK_BYTES,
                       INT8_BLOCK_BYTES);
        copy_rows(stage + ROW_GROUPS * INT8_BLOCK_BYTES, problem.outlier_activations, BLOCK_K, first_token, problem.padded_tokens);
        copy_commit();
    }
};

// --------------------------------------------------------------------------------------------------- multiply

INLINE void multiply_body(Sums& sums, uint8* ring, const Tile& tile, const Warp& warp) {
    for (int stage = 0; stage < STAGES - 1; ++stage) tile.load(ring + stage * STAGE_BYTES, tile.first_block + stage);
    int read = 0, write = STAGES - 1;
#pragma unroll 1
    for (int block = tile.first_block; block < tile.last_block; ++block) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // the stage is there for all, and nobody reads the one that is filled next
        tile.load(ring + write * STAGE_BYTES, block + STAGES - 1);
        Body::multiply(sums, ring + read * STAGE_BYTES, warp);
        read = read + 1 == STAGES ? 0 : read + 1;
        write = write + 1 == STAGES ? 0 : write + 1;
    }
    copy_wait<0>();
    __syncthreads();
}

// The outliers' part of the results, with their own scales.
INLINE void add_outliers(float (&results)[ROW_TILES][TOKEN_TILES][4], uint8* stage, const Tile& tile, const Warp& warp) {
    const Problem& problem = tile.problem;
    tile.load_outliers(stage);
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
        WeightFragment fragment;
        unpack_int8(fragment, stage + warp.slice(row_tile) / 4 * INT8_BLOCK_BYTES, warp.thread_in_group(row_tile));
        const int row = tile.first_row + warp.row(row_tile);
        const float upper = row < problem.rows ? problem.outlier_row_scale[row] : 0.f;
        const float lower = row + 8 < problem.rows ? problem.outlier_row_scale[row + 8] : 0.f;
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            uint32 first[4], second[4];
            const uint8* operand = stage + ROW_GROUPS * INT8_BLOCK_BYTES;
            load_matrices(first, token_chunk<BLOCK_K>(operand, warp.token_tile(token_tile), 0, warp.lane));
            load_matrices(second, token_chunk<BLOCK_K>(operand, warp.token_tile(token_tile), 4, warp.lane));
            int sums[4] = {0, 0, 0, 0};
            multiply_s8(sums, fragment, first, second);
            const int token = min(tile.first_token + warp.token(token_tile), problem.padded_tokens - 2);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                results[row_tile][token_tile][i] +=
                    static_cast<float>(sums[i]) * (i < 2 ? upper : lower) * problem.outlier_token_scale[token + i % 2];
        }
    }
    __syncthreads();
}

// ------------------------------------------------------------------------------------------------------ split

// Leaves this block's sums in memory. The last block of the tile to come gets true and the sums of all, added in the
// order of the splits.
INLINE bool gather_splits(Sums& sums, const Problem& problem, int tile, int split, int splits, int* shared_order) {
    constexpr int VECTORS = ROW_TILES * TOKEN_TILES;
    float4* slab = problem.partials + static_cast<long long>(tile) * splits * VECTORS * THREADS + threadIdx.x;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
        slab[(split * VECTORS + i) * THREADS] = reinterpret_cast<const float4*>(sums)[i];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *shared_order = atomicAdd(problem.counters + tile, 1);
    __syncthreads();
    if (*shared_order != splits - 1) return false;
    __threadfence();
    if (threadIdx.x == 0) problem.counters[tile] = 0;
    Body::reset(sums);
    for (int other = 0; other < splits; ++other)
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const float4 part = slab[(other * VECTORS + i) * THREADS];
            const Body::Sum* values = reinterpret_cast<const Body::Sum*>(&part);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i / TOKEN_TILES][i % TOKEN_TILES][j] += values[j];
        }
    return true;
}

// ------------------------------------------------------------------------------------------------------ store

// Through shared memory, [token][row], so that a warp writes whole runs of output channels.
INLINE void store(const float (&results)[ROW_TILES][TOKEN_TILES][4], uint8* memory, const Tile& tile, const Warp& warp) {
    const Problem& problem = tile.problem;
    OUTPUT* staging = reinterpret_cast<OUTPUT*>(memory);
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = warp.row(row_tile) + i / 2 * 8, token = warp.token(token_tile) + i % 2;
                staging[token * OUTPUT_PITCH + row] = from_float<OUTPUT>(results[row_tile][token_tile][i]);
            }
    __syncthreads();
    constexpr int WIDTH = 16 / sizeof(OUTPUT);
    const bool aligned = problem.rows % WIDTH == 0;
    for (int at = threadIdx.x * WIDTH; at < TOKENS * ROWS; at += THREADS * WIDTH) {
        const int token = tile.first_token + at / ROWS, row = tile.first_row + at % ROWS;
        if (token >= problem.tokens || row >= problem.rows) continue;
        const OUTPUT* source = staging + at / ROWS * OUTPUT_PITCH + at % ROWS;
        OUTPUT* destination = problem.output + static_cast<long long>(token) * problem.rows + row;
        if (aligned) *reinterpret_cast<uint4*>(destination) = *reinterpret_cast<const uint4*>(source);
        else
            for (int i = 0; i < min(WIDTH, problem.rows - row); ++i) destination[i] = source[i];
    }
}

// ---------------------------------------------------------------------------------------------------- kernel

// Grid: (row tiles, token tiles, splits).
extern "C" __global__ void __launch_bounds__(THREADS)
gemm(const uint8* weights, const uint8* outlier_weights, const uint8* activations, const uint8* outlier_activations,
     const uint8* group_scales, const float* row_scale, const float* outlier_row_scale, const float* token_scale,
     const float* outlier_token_scale, const float* bias, OUTPUT* output, float4* partials, int* counters, int rows, int tokens,
     int padded_tokens, int blocks) {
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    const Problem problem{weights, outlier_weights, activations, outlier_activations, group_scales, row_scale, outlier_row_scale,
                          token_scale, outlier_token_scale, bias, output, partials, counters, rows, tokens, padded_tokens, blocks};
    const int split = blockIdx.z, splits = gridDim.z;
    const Tile tile{static_cast<int>(blockIdx.x) * ROWS, static_cast<int>(blockIdx.y) * TOKENS, blocks * split / splits,
                    blocks * (split + 1) / splits, problem};
    const Warp warp;

    Sums sums;
    Body::reset(sums);
    multiply_body(sums, shared_bytes, tile, warp);
    if (splits > 1 && !gather_splits(sums, problem, blockIdx.y * gridDim.x + blockIdx.x, split, splits, reinterpret_cast<int*>(shared_bytes)))
        return;

    float results[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                results[row_tile][token_tile][i] =
                    Body::result(sums[row_tile][token_tile][i], problem, tile.first_row + warp.row(row_tile) + i / 2 * 8,
                                 min(tile.first_token + warp.token(token_tile) + i % 2, padded_tokens - 1));
    __syncthreads();
    if (outlier_weights) add_outliers(results, shared_bytes, tile, warp);
    if (bias) {
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = tile.first_row + warp.row(row_tile) + half * 8;
                const float value = row < rows ? bias[row] : 0.f;
#pragma unroll
                for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile)
#pragma unroll
                    for (int i = 0; i < 2; ++i) results[row_tile][token_tile][half * 2 + i] += value;
            }
    }
    store(results, shared_bytes, tile, warp);
}
