// What a kernel of gemm_sm80.cuh works on: the problem, the part of a tile that a warp computes, its MMA operands.
#pragma once
#include "load.cuh"
#include "mma_sync.cuh"
#include "numbers.cuh"
#include "unpack.cuh"

// ROW_WARPS, TOKEN_WARPS, ROW_TILES, TOKEN_TILES, STAGES and OUTPUT come from the compiler's command line.
constexpr int WARPS = ROW_WARPS * TOKEN_WARPS, THREADS = WARPS * 32;
constexpr int ROWS = ROW_WARPS * ROW_TILES * 16, TOKENS = TOKEN_WARPS * TOKEN_TILES * 8;
constexpr int ROW_GROUPS = ROWS / BLOCK_ROWS;
static_assert(ROWS % BLOCK_ROWS == 0, "weights come in groups of 64 rows");

struct Problem {
    const uint8* weights;              // [row group of 64][block][WEIGHT_BYTES]
    const uint8* outlier_weights;      // [row group][INT8_BLOCK_BYTES], or null
    const uint8* activations;          // [block][padded_tokens][TOKEN_BYTES], swizzled
    const uint8* outlier_activations;  // [padded_tokens][128], swizzled
    const uint8* group_scales;         // [block][padded_tokens][SCALE_BYTES]
    const float* row_scale;            // [rows]
    const float* outlier_row_scale;
    const float* token_scale;          // [padded_tokens]
    const float* outlier_token_scale;
    const float* bias;                 // [rows], or null
    OUTPUT* output;                    // [tokens][rows]
    float4* partials;                  // [tile][split][accumulators of a block]
    int* counters;                     // [tile], zero between launches
    int rows, tokens, padded_tokens, blocks;

    INLINE int row_groups() const { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }
};

// Which part of the tile a warp computes.
struct Warp {
    int index, lane, row_warp, token_warp;

    INLINE Warp() : index(threadIdx.x / 32), lane(threadIdx.x % 32), row_warp(index % ROW_WARPS), token_warp(index / ROW_WARPS) {}
    INLINE int slice(int row_tile) const { return row_tile * ROW_WARPS + row_warp; }                  // of 16 rows
    INLINE int row(int row_tile) const { return slice(row_tile) * 16 + lane / 4; }                    // and row + 8
    INLINE int token_tile(int token_tile) const { return (token_warp * TOKEN_TILES + token_tile) * 8; }
    INLINE int token(int tile) const { return token_tile(tile) + lane % 4 * 2; }                      // and token + 1
    INLINE int thread_in_group(int row_tile) const { return slice(row_tile) % 4 * 32 + lane; }        // as weights are packed
};

// Weights of one slice of 16 rows as MMA operands, and the chunk of a swizzled token row that a lane loads for ldmatrix.
template <int BYTES> INLINE const uint8* token_chunk(const uint8* operand, int token_tile, int chunk, int lane) {
    const int token = token_tile + lane % 8;
    const int swizzle = BYTES == 128 ? token & 7 : token >> 1 & 3;
    return operand + token * BYTES + ((chunk + lane / 8) ^ swizzle) * 16;
}

// sums += slice (16 x 128, s8) * tokens (128 x 8, s8)
INLINE void multiply_s8(int (&sums)[4], const WeightFragment& fragment, const uint32 (&first)[4], const uint32 (&second)[4]) {
    mma_s8(sums, fragment.step[0], first[0], first[1], sums);
    mma_s8(sums, fragment.step[1], first[2], first[3], sums);
    mma_s8(sums, fragment.step[2], second[0], second[1], sums);
    mma_s8(sums, fragment.step[3], second[2], second[3], sums);
}
