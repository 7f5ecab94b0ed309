// FP4 on both sides with the block-scaled MMAs of sm_120a: NVFP4 (GROUP 16, E4M3 scales), MXFP4 (GROUP 32, E8M0), whose
// scales the MMA applies itself, and E2M1 in groups of 128 with fp16 scales, whose sums are promoted by two operations.
#include "tile_sm80.cuh"

#include "mma_fp4.cuh"

constexpr uint32 UNIT_SCALES = 0x38383838;  // four times 1 in E4M3

// A k-block: E2M1 codes, then the scales of 64 rows; the scales of the tokens.
struct Body {
    static constexpr int GROUPS = BLOCK_K / GROUP;
    static constexpr int SCALE_BYTES = GROUP == 128 ? 2 : GROUPS;
    static constexpr int WEIGHT_BYTES = BLOCK_ROWS * BLOCK_K / 2 + BLOCK_ROWS * SCALE_BYTES;
    static constexpr int TOKEN_BYTES = BLOCK_K / 2;
    using Sum = float;
    using Sums = float[ROW_TILES][TOKEN_TILES][4];

    // 16 rows x 128 channels: two m16k64 operands and this lane's share of their scales.
    struct Slice {
        uint32 step[2][4];
        uint32 scales[2];  // of the MMA; for groups of 128 fp16 bits of rows g and g + 8
    };

    static INLINE void reset(Sums& sums) {
#pragma unroll
        for (int i = 0; i < ROW_TILES * TOKEN_TILES * 4; ++i) (&sums[0][0][0])[i] = 0.f;
    }

    // Scales of one row or token in the order of the MMA's two k64 steps.
    static INLINE void read_scales(uint32 (&scales)[2], const uint8* all, int index) {
#pragma unroll
        for (int step = 0; step < 2; ++step)
            scales[step] = GROUP == 16 ? reinterpret_cast<const uint32*>(all)[index * 2 + step]
                                       : reinterpret_cast<const uint16*>(all)[index * 2 + step];
    }

    static INLINE void read(Slice& slice, const uint8* group, int thread) {
        const uint4* packed = reinterpret_cast<const uint4*>(group) + thread;
        const uint8* scales = group + BLOCK_ROWS * BLOCK_K / 2;
        const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint4 words = packed[step * 128];
            slice.step[step][0] = words.x;
            slice.step[step][1] = words.y;
            slice.step[step][2] = words.z;
            slice.step[step][3] = words.w;
        }
        if (GROUP == 128) {
            slice.scales[0] = reinterpret_cast<const uint16*>(scales)[row];
            slice.scales[1] = reinterpret_cast<const uint16*>(scales)[row + 8];
        } else {
            read_scales(slice.scales, scales, row + thread % 2 * 8);
        }
    }

    static INLINE void mma(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const float (&c)[4], uint32 scale_a, uint32 scale_b) {
        if constexpr (GROUP == 32) mma_mxfp4(d, a, b0, b1, c, scale_a, scale_b);
        else mma_nvfp4(d, a, b0, b1, c, scale_a, scale_b);
    }

    static INLINE void multiply(Sums& sums, const uint8* stage, const Warp& warp) {
        Slice slices[ROW_TILES];
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
            read(slices[row_tile], stage + warp.slice(row_tile) / 4 * WEIGHT_BYTES, warp.thread_in_group(row_tile));
        const uint8* operand = stage + ROW_GROUPS * WEIGHT_BYTES;
        const uint8* scales = operand + TOKENS * TOKEN_BYTES;
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            uint32 tokens[4];
            load_matrices(tokens, token_chunk<TOKEN_BYTES>(operand, warp.token_tile(token_tile), 0, warp.lane));
            if constexpr (GROUP == 128) {
                const fp16* token_scales = reinterpret_cast<const fp16*>(scales) + warp.token(token_tile);
                const float scale[2] = {to_float(token_scales[0]), to_float(token_scales[1])};
#pragma unroll
                for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
                    const Slice& slice = slices[row_tile];
                    constexpr float ZERO[4] = {0.f, 0.f, 0.f, 0.f};
                    float sum[4];
                    mma(sum, slice.step[0], tokens[0], tokens[1], ZERO, UNIT_SCALES, UNIT_SCALES);
                    mma(sum, slice.step[1], tokens[2], tokens[3], sum, UNIT_SCALES, UNIT_SCALES);
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        sums[row_tile][token_tile][i] =
                            __fmaf_rn(sum[i] * scale[i % 2], half_to_float(slice.scales[i / 2]), sums[row_tile][token_tile][i]);
                }
            } else {
                uint32 token_scales[2];
                read_scales(token_scales, scales, warp.token_tile(token_tile) + warp.lane / 4);
#pragma unroll
                for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
                    for (int step = 0; step < 2; ++step)
                        mma(sums[row_tile][token_tile], slices[row_tile].step[step], tokens[2 * step], tokens[2 * step + 1],
                            sums[row_tile][token_tile], slices[row_tile].scales[step], token_scales[step]);
            }
        }
    }

    // E4M3 scales are in units: one of the tensor, one of each token.
    static INLINE float result(float sum, const Problem& problem, int row, int token) {
        return GROUP == 16 ? sum * (row < problem.rows ? problem.row_scale[row] : 0.f) * problem.token_scale[token] : sum;
    }
};

#include "gemm_sm80.cuh"
