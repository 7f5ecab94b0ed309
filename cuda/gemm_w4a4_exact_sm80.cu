// The paper's W4A4, exactly: INT4 codes on both sides, an fp16 scale for each group of 128 channels on both sides,
// y = sum over groups of s_x * s_w * (integer sum). Native INT4 MMAs on sm_80 to sm_89.
#include "tile_sm80.cuh"

// The accumulator of an MMA that starts at 0x4B400000 is the fp32 number 1.5 * 2^23 + sum, so promotion needs no
// conversion: two FMAs take it to s_w * (s_x * sum). Exact up to the last rounding of each: 1.5 * 2^23 * s_x has 13
// significant bits. On sm_80 the conversion alone would cost more than the MMA.
constexpr uint32 SUM_ORIGIN_BITS = 0x4B400000;
constexpr float SUM_ORIGIN = 12582912.f;

// Without native INT4, nibbles become bytes of 16 times their value: sums are 256 times as large.
#if defined(EMULATED_INT4) || __CUDA_ARCH__ >= 900
constexpr bool NATIVE_INT4 = false;
#else
constexpr bool NATIVE_INT4 = true;
#endif
constexpr float SUM_UNIT = NATIVE_INT4 ? 1.f : 1.f / 256;

// A k-block is one group: INT4 codes, then 64 fp16 scales of the rows; fp16 scales of the tokens.
struct Body {
    static constexpr int WEIGHT_BYTES = BLOCK_ROWS * BLOCK_K / 2 + BLOCK_ROWS * 2;
    static constexpr int TOKEN_BYTES = BLOCK_K / 2, SCALE_BYTES = 2;
    using Sum = float;
    using Sums = float[ROW_TILES][TOKEN_TILES][4];

    // 16 rows x 128 channels of s4: two m16k64 operands.
    struct Slice {
        uint32 step[2][4];
        float scale[2];  // of rows g and g + 8
    };

    static INLINE void reset(Sums& sums) {
#pragma unroll
        for (int i = 0; i < ROW_TILES * TOKEN_TILES * 4; ++i) (&sums[0][0][0])[i] = 0.f;
    }

    static INLINE void read(Slice& slice, const uint8* group, int thread) {
        const uint4* packed = reinterpret_cast<const uint4*>(group) + thread;
        const fp16* scales = reinterpret_cast<const fp16*>(group + BLOCK_ROWS * BLOCK_K / 2) + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const uint4 words = packed[step * 128];
            slice.step[step][0] = words.x;
            slice.step[step][1] = words.y;
            slice.step[step][2] = words.z;
            slice.step[step][3] = words.w;
        }
        slice.scale[0] = to_float(scales[0]);
        slice.scale[1] = to_float(scales[8]);
    }

    static INLINE uint32 low_nibbles(uint32 word) { return word << 4 & 0xF0F0F0F0; }
    static INLINE uint32 high_nibbles(uint32 word) { return word & 0xF0F0F0F0; }

    // Two MMAs over the low and the high nibbles: both operands take their channels in the same, other order.
    static INLINE void mma_nibbles(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
        const uint32 low[4] = {low_nibbles(a[0]), low_nibbles(a[1]), low_nibbles(a[2]), low_nibbles(a[3])};
        const uint32 high[4] = {high_nibbles(a[0]), high_nibbles(a[1]), high_nibbles(a[2]), high_nibbles(a[3])};
        mma_s8(d, low, low_nibbles(b0), low_nibbles(b1), c);
        mma_s8(d, high, high_nibbles(b0), high_nibbles(b1), d);
    }

    static INLINE void mma(int (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, const int (&c)[4]) {
        if constexpr (NATIVE_INT4) mma_s4(d, a, b0, b1, c);
        else mma_nibbles(d, a, b0, b1, c);
    }

    static INLINE void multiply(Sums& sums, const uint8* stage, const Warp& warp) {
        constexpr int ORIGIN[4] = {SUM_ORIGIN_BITS, SUM_ORIGIN_BITS, SUM_ORIGIN_BITS, SUM_ORIGIN_BITS};
        Slice slices[ROW_TILES];
#pragma unroll
        for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
            read(slices[row_tile], stage + warp.slice(row_tile) / 4 * WEIGHT_BYTES, warp.thread_in_group(row_tile));
        const uint8* operand = stage + ROW_GROUPS * WEIGHT_BYTES;
        const fp16* token_scales = reinterpret_cast<const fp16*>(operand + TOKENS * TOKEN_BYTES);
#pragma unroll
        for (int token_tile = 0; token_tile < TOKEN_TILES; ++token_tile) {
            uint32 tokens[4];
            load_matrices(tokens, token_chunk<TOKEN_BYTES>(operand, warp.token_tile(token_tile), 0, warp.lane));
            float scale[2], origin[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                scale[i] = to_float(token_scales[warp.token(token_tile) + i]) * SUM_UNIT;
                origin[i] = -SUM_ORIGIN * scale[i];
            }
#pragma unroll
            for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
                const Slice& slice = slices[row_tile];
                int sum[4];
                mma(sum, slice.step[0], tokens[0], tokens[1], ORIGIN);
                mma(sum, slice.step[1], tokens[2], tokens[3], sum);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float scaled = __fmaf_rn(__int_as_float(sum[i]), scale[i % 2], origin[i % 2]);
                    sums[row_tile][token_tile][i] = __fmaf_rn(scaled, slice.scale[i / 2], sums[row_tile][token_tile][i]);
                }
            }
        }
    }

    static INLINE float result(float sum, const Problem&, int, int) { return sum; }
};

#include "gemm_sm80.cuh"
