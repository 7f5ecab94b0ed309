// What a decode step needs of each row before its first block: where the pending token's key and value go, its rotation, its
// embedding, and the row's length with it. A row without a sequence has length 0 and stays so; its slot is negative.
//
// One block a row. The next kernel starts after this one, and everything written here is visible to whatever starts then:
// later kernels read lengths while the one before them still runs.

#include "chain.cuh"

struct alignas(16) Piece { unsigned words[4]; };

extern "C" __global__ void begin_decode(const long long* tokens, int* lengths, const int* page_table, const float* cos, const float* sin,
                                        const Piece* embedding, long long* positions, long long* slots, float* row_cos, float* row_sin,
                                        Piece* embedded, int page, int table_stride, int half, int pieces) {
  wait_for_previous_kernel();
  const int row = blockIdx.x, length = lengths[row];
  const long long token = tokens[row];
  for (int i = threadIdx.x; i < pieces; i += blockDim.x) embedded[(long long)row * pieces + i] = embedding[token * pieces + i];
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    row_cos[row * half + i] = cos[(long long)length * half + i];
    row_sin[row * half + i] = sin[(long long)length * half + i];
  }
  __syncthreads();  // all have read the length
  if (threadIdx.x == 0) {
    const long long held = page_table[(long long)row * table_stride + length / page];
    positions[row] = length;
    slots[row] = length > 0 ? held * page + length % page : -1;
    lengths[row] = length + (length > 0);
  }
  __threadfence();
}
