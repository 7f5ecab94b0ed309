// A token's row in shared memory, through (residual add +) RMSNorm or SiLU(gate) * up. The whole CTA stages it, channel by
// channel; behind it lies a zero, which padding channels gather.
#pragma once

#include "prologue.cuh"

using PartialSums = float[32];  // one of each warp, of the squares of the row

constexpr int stage_width = aligned ? 16 / sizeof(Input) : 1;
struct alignas(sizeof(Input) * stage_width) StageChunk {
  Input values[stage_width];
};

// The sum over the CTA.
__device__ __forceinline__ float sum_over_cta(float sum, PartialSums& partial_sums) {
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(all_lanes, sum, distance);
  if (threadIdx.x % 32 == 0) partial_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x % 32 < blockDim.x / 32 ? partial_sums[threadIdx.x % 32] : 0.0f;
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(all_lanes, sum, distance);
  return sum;
}

// The row that a CTA reads, and where it puts what the layer's input is: the sum, and (or null) the row before the transform.
struct Row {
  const Input *x, *other, *norm_weight;
  Input *residual_out, *row_out;
  int channels;
  bool writes;  // one CTA of a cluster does
};

// Brings the token's row into shared memory, rounded to the input's dtype wherever torch would hold it in a tensor.
// WEIGHT_AHEAD: `first_weight` is this thread's first chunk of the norm's weight.
template <bool WEIGHT_AHEAD>
__device__ __forceinline__ void stage_row(Input* staged, PartialSums& partial_sums, const Row& row, const StageChunk& first_weight, float epsilon,
                                          int unit_offset) {
  const int channels = row.channels;
  float squares = 0.0f;
  for (int channel = threadIdx.x * stage_width; channel < channels; channel += blockDim.x * stage_width) {
    StageChunk chunk = *reinterpret_cast<const StageChunk*>(row.x + channel), second;
    if (prologue == ADD_NORM || prologue == SILU_MUL) second = *reinterpret_cast<const StageChunk*>(row.other + channel);
#pragma unroll
    for (int i = 0; i < stage_width; i++) {
      float value = to_float(chunk.values[i]);
      if (prologue == ADD_NORM) value = rounded<Input>(value + to_float(second.values[i]));
      if (prologue == SILU_MUL) value = rounded<Input>(silu(value)) * to_float(second.values[i]);
      if (has_norm) squares += value * value;
      if (prologue == ADD_NORM || prologue == SILU_MUL) chunk.values[i] = from_float<Input>(value);
    }
    if (prologue == ADD_NORM && row.writes) *reinterpret_cast<StageChunk*>(row.residual_out + channel) = chunk;
    if (prologue == SILU_MUL && row.writes && row.row_out) *reinterpret_cast<StageChunk*>(row.row_out + channel) = chunk;
    *reinterpret_cast<StageChunk*>(staged + channel) = chunk;
  }
  if (threadIdx.x == 0) staged[channels] = from_float<Input>(0.0f);
  if (has_norm) {
    const float inverse = rsqrtf(sum_over_cta(squares, partial_sums) / (float)channels + epsilon);
    for (int channel = threadIdx.x * stage_width; channel < channels; channel += blockDim.x * stage_width) {
      StageChunk chunk = *reinterpret_cast<StageChunk*>(staged + channel), weight = first_weight;
      if (!WEIGHT_AHEAD || channel >= blockDim.x * stage_width) weight = *reinterpret_cast<const StageChunk*>(row.norm_weight + channel);
#pragma unroll
      for (int i = 0; i < stage_width; i++) {
        float value = to_float(chunk.values[i]) * inverse, scale = to_float(weight.values[i]);
        // Gemma keeps fp32 up to the product and stores its weights minus one; everybody else rounds in between.
        value = unit_offset ? value * (1.0f + scale) : rounded<Input>(value) * scale;
        chunk.values[i] = from_float<Input>(value);
      }
      *reinterpret_cast<StageChunk*>(staged + channel) = chunk;
      if (row.row_out && row.writes) *reinterpret_cast<StageChunk*>(row.row_out + channel) = chunk;
    }
  }
  __syncthreads();
}
