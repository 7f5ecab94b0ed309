// INT8 weights with one scale per row, times INT8 operands with one scale per token.
#include "unpack.cuh"

constexpr int WEIGHT_BYTES = INT8_BLOCK_BYTES, PLANES = 1, SUMMED_BLOCKS = 0;
using Sum = int;
using Fragment = WeightFragment;
INLINE void unpack(Fragment& fragment, const uint8* block, int thread) { unpack_int8(fragment, block, thread); }

#include "gemm_sm90a.cuh"
