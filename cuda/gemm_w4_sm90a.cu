// INT4 weights with two-level integer scales, times INT8 operands (per-token A8 or two-level A4), INT8 outlier channels.
#include "unpack.cuh"

constexpr int WEIGHT_BYTES = INT4_BLOCK_BYTES, PLANES = 1, SUMMED_BLOCKS = 0;
using Sum = int;
using Fragment = WeightFragment;
INLINE void unpack(Fragment& fragment, const uint8* block, int thread) { unpack_int4(fragment, block, thread); }

#include "gemm_sm90a.cuh"
