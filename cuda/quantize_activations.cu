// Quantizes the input of a linear layer and writes it as the operand that the GEMM reads (quantize_rows.cuh): one CTA for
// a token, or a cluster of CLUSTER. Many tokens of 16 bits have quantize_pairs.cu.

#include "quantize_rows.cuh"

// x, other (residual or up): rows of `channels`, strides in elements. norm_weight (channels,). table (blocks * 128,): the
// source of each operand channel, `channels` for padding, with the sign in the top bit. residual_out receives x + other,
// row_out (or null) what the layer's input is before the transform. operand: body k-blocks, outlier_operand: theirs.
// token_scale, outlier_scale (padded_tokens,) fp32; group_scales (groups, padded_tokens) of S8, otherwise
// (k-blocks, padded_tokens, groups of a block): as stored, fp16 or bytes, and for the e4m3 container what they are worth, fp32.
// Tokens past `tokens` are padding rows of zeros.
#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTERED
#endif
extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS)
quantize_activations(const Input* x, const Input* other, const Input* norm_weight, const Index* table, Input* residual_out, Input* row_out,
                     unsigned char* operand, unsigned char* outlier_operand, float* token_scale, float* outlier_scale,
                     unsigned char* group_scales, int tokens, int padded_tokens, int channels, int body, int x_stride, int other_stride,
                     float clip, float token_factor, float group_factor, float epsilon, int unit_offset) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared* shared = reinterpret_cast<Shared*>(shared_bytes);
  Input* staged = reinterpret_cast<Input*>(shared + 1);

  __shared__ unsigned long long landed;
  __shared__ uint2 maxima[ctas_per_token][32];  // of each warp of the cluster: of the body and of the outliers

  const unsigned rank = ctas_per_token > 1 ? cluster_rank() : 0;
  const int token = blockIdx.x / ctas_per_token;
  const Shape shape(channels, body);
  const Lane lane(shape, rank);

  allow_next_kernel();
  const Ahead known(table, norm_weight, shape, lane);
  if (ctas_per_token > 1) {
    if (threadIdx.x == 0) expect_bytes(landed, ctas_per_token * (blockDim.x / 32) * sizeof(uint2));
    cluster_sync();
  }
  wait_for_previous_kernel();
  if (token < tokens) {
    const size_t offset = (size_t)token * channels;
    const Row row = {x + (size_t)token * x_stride, other + (size_t)token * other_stride, norm_weight, residual_out + offset,
                     row_out ? row_out + offset : nullptr, channels, rank == 0};
    stage_row(staged, shared, row, known.first_weight, epsilon, unit_offset);
  } else {
    for (int i = threadIdx.x; i <= channels; i += blockDim.x) staged[i] = from_float<Input>(0.0f);
    __syncthreads();
  }
  const Operand to = {operand, outlier_operand, token_scale, outlier_scale, group_scales, padded_tokens};
  quantize_staged(to, staged, shared, table, known, lane, shape, {clip, token_factor, group_factor}, token, {rank, maxima, landed});
}
