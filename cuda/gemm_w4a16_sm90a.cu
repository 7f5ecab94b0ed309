// 4-bit weights with any group scales, times fp16 operands with one power-of-two scale per token.
#include "mma_half.cuh"
#include "unpack_f16.cuh"

constexpr int WEIGHT_BYTES = SCALED_BLOCK_BYTES, PLANES = 2, SUMMED_BLOCKS = 0;
using Sum = float;
using Fragment = HalfFragment;
INLINE void unpack(Fragment& fragment, const uint8* block, int thread) { unpack_scaled(fragment, block, thread); }

template <int COUNT> INLINE void mma(float (&sums)[COUNT], const uint32 (&weights)[4], uint64 activations) {
    Float16Warpgroup::mma<false>(sums, weights, activations, 1);
}

#include "gemm_sm90a.cuh"
