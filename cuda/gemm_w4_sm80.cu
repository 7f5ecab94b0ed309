// INT4 weights with two-level integer scales, or INT8 weights with a scale per row (WEIGHT_BITS 8), times INT8 operands
// (per-token A8 or two-level A4): integers to the end, one scale per row and token.
#include "tile_sm80.cuh"

// A k-block of exact INT8 operands.
struct Body {
    static constexpr int WEIGHT_BYTES = WEIGHT_BITS == 4 ? INT4_BLOCK_BYTES : INT8_BLOCK_BYTES;
    static constexpr int TOKEN_BYTES = BLOCK_K, SCALE_BYTES = 0;
    using Sum = int;
    using Sums = int[ROW_TILES][TOKEN_TILES][4];

    static INLINE void reset(Sums& sums) {
#pragma unroll
        for (int i = 0; i < ROW_TILES * TOKEN_TILES * 4; ++i) (&sums[0][0][0])[i] = 0;
    }

    static INLINE void multiply(Sums& sums, const uint8* stage, const Warp& warp) {
        WeightFragment fragments[ROW_TILES];
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
            const uint8* group = stage + warp.slice(row_tile) / 4 * WEIGHT_BYTES;
            if (WEIGHT_BITS == 4) unpack_int4(fragments[row_tile], group, warp.thread_in_group(row_tile));
            else unpack_int8(fragments[row_tile], group, warp.thread_in_group(row_tile));
        }
        const uint8* operand = stage + ROW_GROUPS * WEIGHT_BYTES;
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            uint32 first[4], second[4];
            load_matrices(first, token_chunk<BLOCK_K>(operand, warp.token_tile(token_tile), 0, warp.lane));
            load_matrices(second, token_chunk<BLOCK_K>(operand, warp.token_tile(token_tile), 4, warp.lane));
#pragma unroll
            for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) multiply_s8(sums[row_tile][token_tile], fragments[row_tile], first, second);
        }
    }

    static INLINE float result(int sum, const Problem& problem, int row, int token) {
        return static_cast<float>(sum) * (row < problem.rows ? problem.row_scale[row] : 0.f) * problem.token_scale[token];
    }
};

#include "gemm_sm80.cuh"
