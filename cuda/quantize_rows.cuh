// Quantizing the input of a linear layer a token at a time, by a CTA or by a cluster of CLUSTER CTAs:
//
//   stage      the row in shared memory, through (residual add +) RMSNorm or SiLU(gate) * up
//   transform  gather by the layout's permutation, flip signs, Hadamard inside each block of 128 channels
//   measure    the range of each group, and of the whole token
//   encode     scales and codes by the rule of atomcli/formats/activations.py, bit for bit
//   store      operand[k-block][token][128 bytes], the 16-byte chunks of a row xor-swizzled as the tensor cores read them
#pragma once

#include "chain.cuh"
#include "cluster.cuh"
#include "quantize_transform.cuh"

constexpr int ctas_per_token = CLUSTER;  // each stages the whole row and quantizes a part of it
constexpr int slots_per_cta = SLOTS;     // k-blocks that a CTA works on at a time; threads beyond only stage
constexpr int blocks_per_lane = BLOCKS;  // k-blocks that a lane keeps in registers
constexpr bool in_passes = PASSES;       // rows too long for that are transformed twice
constexpr bool weight_ahead = overlaps && channels_per_lane == 4;  // with many tokens occupancy is worth more
constexpr bool ahead = overlaps && has_table && !in_passes && blocks_per_lane * channels_per_lane <= 16;  // indices fit into registers

// What one CTA shares. The row follows, channel by channel, and behind it a zero that padding channels gather.
struct Shared {
  float partial_sums[32];  // one of each warp, of the squares of the row
  unsigned absmax[2][32];  // one of each warp, of the body and of the outliers, as ordered integers
};

// ---------------------------------------------------------------------------------------------------- stage

constexpr int stage_width = aligned ? 16 / sizeof(Input) : 1;
struct alignas(sizeof(Input) * stage_width) StageChunk {
  Input values[stage_width];
};

// The sum over the CTA.
__device__ __forceinline__ float sum_over_cta(float sum, Shared* shared) {
  for (int distance = 16; distance; distance /= 2) sum += __shfl_xor_sync(all_lanes, sum, distance);
  if (threadIdx.x % 32 == 0) shared->partial_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x % 32 < blockDim.x / 32 ? shared->partial_sums[threadIdx.x % 32] : 0.0f;
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
__device__ __forceinline__ void stage_row(Input* staged, Shared* shared, const Row& row, const StageChunk& first_weight, float epsilon, int unit_offset) {
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
    const float inverse = rsqrtf(sum_over_cta(squares, shared) / (float)channels + epsilon);
    for (int channel = threadIdx.x * stage_width; channel < channels; channel += blockDim.x * stage_width) {
      StageChunk chunk = *reinterpret_cast<StageChunk*>(staged + channel), weight = first_weight;
      if (!weight_ahead || channel >= blockDim.x * stage_width) weight = *reinterpret_cast<const StageChunk*>(row.norm_weight + channel);
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

// ------------------------------------------------------------------------------------------------ transform

// Sources of four neighbouring operand channels.
struct alignas(sizeof(Index) * 4) Indices {
  Index index[4];
};
using LaneIndices = Indices[channels_per_lane / 4];

__device__ __forceinline__ void read_indices(LaneIndices& indices, const Index* table, int block, int position) {
#pragma unroll
  for (int i = 0; i < channels_per_lane / 4; i++)
    indices[i] = *reinterpret_cast<const Indices*>(table + block * block_channels + position + 4 * i);
}

// The lane's channels of one k-block, in the layout's order; padding channels are zero.
__device__ __forceinline__ void gather(Values& values, const Input* staged, const Index* table, const LaneIndices& known, int block, int position,
                                       const Shape& shape) {
  if (has_table) {
#pragma unroll
    for (int i = 0; i < channels_per_lane; i += 4) {
      Indices four = ahead ? known[i / 4] : *reinterpret_cast<const Indices*>(table + block * block_channels + position + i);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float value = to_float(staged[four.index[j] & (Index)~sign_bit]);
        values[i + j] = four.index[j] & sign_bit ? -value : value;
      }
    }
  } else {
    int exist = channels_of(block, shape) - position;
    const Input* source = staged + first_channel(block, shape) + position;
    struct alignas(4 * sizeof(Input)) Four {
      Input values[4];
    };
#pragma unroll
    for (int i = 0; i < channels_per_lane; i += 4) {
      if (aligned && exist >= channels_per_lane) {
        Four four = *reinterpret_cast<const Four*>(source + i);
#pragma unroll
        for (int j = 0; j < 4; j++) values[i + j] = to_float(four.values[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; j++) values[i + j] = i + j < exist ? to_float(source[i + j]) : 0.0f;
      }
    }
  }
}

__device__ __forceinline__ void transform(Values& values, const Input* staged, const Index* table, const LaneIndices& known, int block, int position,
                                          const Shape& shape) {
  if (block < shape.blocks) {
    gather(values, staged, table, known, block, position, shape);
  } else {
#pragma unroll
    for (int i = 0; i < channels_per_lane; i++) values[i] = 0.0f;
  }
  rotate(values, block, position, shape);
}

// ---------------------------------------------------------------------------------------------- quantize

// What a thread works on: `position` of k-blocks slot, slot + stride, ...; threads beyond the slots only stage.
struct Lane {
  static constexpr int stride = slots_per_cta * ctas_per_token;
  int slot, position;

  __device__ __forceinline__ Lane(const Shape& shape, unsigned rank) {
    slot = threadIdx.x / lanes_per_block;
    slot = slot < slots_per_cta ? slot + (int)rank * slots_per_cta : shape.blocks;
    position = threadIdx.x % lanes_per_block * channels_per_lane;
  }
};

// What does not come from the previous kernel: it is fetched while that one ends.
struct Ahead {
  LaneIndices indices[blocks_per_lane];
  StageChunk first_weight;  // of the norm

  __device__ __forceinline__ Ahead(const Index* table, const Input* norm_weight, const Shape& shape, const Lane& lane) {
    if (ahead) {
#pragma unroll
      for (int i = 0; i < blocks_per_lane; i++)
        if (lane.slot + i * Lane::stride < shape.blocks) read_indices(indices[i], table, lane.slot + i * Lane::stride, lane.position);
    }
    int first = threadIdx.x * stage_width;
    if (weight_ahead && has_norm && first < shape.channels) first_weight = *reinterpret_cast<const StageChunk*>(norm_weight + first);
  }
};

// The CTAs that share a token: each warp's maxima of the body and of the outliers, and the barrier that counts them.
struct Cluster {
  unsigned rank;
  uint2 (*maxima)[32];
  unsigned long long& landed;
};

// Every warp's maxima go to every CTA of the cluster.
__device__ __forceinline__ void send_absmax(const uint2* slots, float absmax, float outlier_absmax, const unsigned long long& landed) {
  unsigned body = __reduce_max_sync(all_lanes, __float_as_uint(absmax)), outliers = __reduce_max_sync(all_lanes, __float_as_uint(outlier_absmax));
  if (threadIdx.x % 32 < ctas_per_token) send(slots + threadIdx.x / 32, body, outliers, landed, threadIdx.x % 32);
}
__device__ __forceinline__ void take_absmax(float& absmax, float& outlier_absmax, const uint2* slots) {
  uint2 largest = {0, 0};
#pragma unroll
  for (int cta = 0; cta < ctas_per_token; cta++) {
    if (threadIdx.x % 32 >= blockDim.x / 32) break;
    uint2 other = slots[cta * 32 + threadIdx.x % 32];
    largest = {max(largest.x, other.x), max(largest.y, other.y)};
  }
  absmax = __uint_as_float(__reduce_max_sync(all_lanes, largest.x));
  outlier_absmax = __uint_as_float(__reduce_max_sync(all_lanes, largest.y));
}

// The staged row as operand rows and scales of `token`.
__device__ __forceinline__ void quantize_staged(const Operand& to, const Input* staged, Shared* shared, const Index* table, const Ahead& known,
                                                const Lane& lane, const Shape& shape, const Factors& factors, int token, const Cluster& cluster) {
  float values[blocks_per_lane][channels_per_lane];
  Range ranges[blocks_per_lane];
  float absmax = 0.0f, outlier_absmax = 0.0f;
  constexpr int together = blocks_per_lane * Lane::stride;  // k-blocks of a pass
  const int passes = in_passes ? (shape.blocks + together - 1) / together : 1;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
#pragma unroll
    for (int i = 0; i < blocks_per_lane; i++) {
      const int block = lane.slot + pass * together + i * Lane::stride;
      transform(values[i], staged, table, known.indices[i], block, lane.position, shape);
      ranges[i] = group_range(values[i]);
      float reach = absmax_of(ranges[i]);
      absmax = fmaxf(absmax, block < shape.body_blocks ? reach : 0.0f);
      outlier_absmax = fmaxf(outlier_absmax, block < shape.body_blocks ? 0.0f : reach);
    }
  }
  if (ctas_per_token > 1) {
    send_absmax(cluster.maxima[cluster.rank], absmax, outlier_absmax, cluster.landed);
    wait_for_bytes(cluster.landed);
    take_absmax(absmax, outlier_absmax, cluster.maxima[0]);
  } else {
    share_absmax(shared->absmax[0], absmax);
    share_absmax(shared->absmax[1], outlier_absmax);
    __syncthreads();
    absmax = shared_absmax(shared->absmax[0]);
    outlier_absmax = shared_absmax(shared->absmax[1]);
  }
  const float body_scale = token_scale_of(absmax, factors), outlier_scale = __fmul_rn(outlier_absmax, per_int8);
  if (threadIdx.x == 0 && cluster.rank == 0) to.token_scale[token] = body_scale, to.outlier_scale[token] = outlier_scale;
  const TokenScale scale = {body_scale, reciprocal_or_zero(body_scale), reciprocal_or_zero(outlier_scale)};
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
#pragma unroll
    for (int i = 0; i < blocks_per_lane; i++) {
      const int block = lane.slot + pass * together + i * Lane::stride;
      if (in_passes) {
        transform(values[i], staged, table, known.indices[i], block, lane.position, shape);
        ranges[i] = group_range(values[i]);
      }
      if (block < shape.blocks) encode(to, values[i], ranges[i], scale, factors, shape, block, lane.position, token);
    }
  }
}
