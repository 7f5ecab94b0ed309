// What quantizing the input of a linear layer consists of, for kernels that quantize the rows of TOKENS tokens in a CTA, or one
// token in a cluster of CLUSTER CTAs:
//
//   stage      the rows in shared memory, through (residual add +) RMSNorm or SiLU(gate) * up
//   transform  gather by the layout's permutation, flip signs, Hadamard inside each block of 128 channels
//   measure    the range of each group, and of the whole token
//   encode     scales and codes by the rule of atomcli/formats/activations.py, bit for bit
//   store      operand[k-block][token][128 bytes], the 16-byte chunks of a row xor-swizzled as the tensor cores read them
//
// The body's channels fill k-blocks of 128, padded with zero channels; the outliers fill k-blocks of their own after it.
// A block is worked on by 128 / CHANNELS neighbouring lanes, CHANNELS (4 or 16) consecutive channels each: few channels
// are quick for a single token, many need fewer shuffles. Two TOKENS lie interleaved in shared memory, so that one gather
// serves both. Arithmetic that decides a code is written with rounding
// intrinsics: a contraction to FMA would move codes.
#pragma once

#include "chain.cuh"
#include "cluster.cuh"
#include "numbers.cuh"

enum Prologue { PLAIN, NORM, ADD_NORM, SILU_MUL };
enum Scales { PER_TOKEN, FP16_GROUP, E8M0_GROUP, E4M3_GROUP, TWO_LEVEL, TWO_LEVEL_ASYMMETRIC };
enum Element { INT4, INT8, E2M1, FLOAT };  // FLOAT is not quantized: fp16 times a power of two
// How a body code is stored: a signed byte, an e4m3 byte, one with the power of two of its group, half a byte, two bytes.
enum Container { S8, E4M3, E4M3_SCALED, NIBBLE, F16 };

using Input = INPUT;      // float, fp16 or bf16
using Index = INDEX;      // of a channel, sign in the top bit: unsigned short or unsigned
constexpr Prologue prologue = PROLOGUE;
constexpr Scales scales = SCALES;
constexpr Element element = ELEMENT;
constexpr Container container = CONTAINER;
constexpr bool has_table = TABLE;        // permutation and signs; without it channels keep their order
constexpr bool has_hadamard = HADAMARD;
constexpr bool aligned = ALIGNED;        // rows, body and pointers allow 16-byte accesses
constexpr int group = GROUP;             // channels per scale, 16 ... 128
constexpr int channels_per_lane = CHANNELS;
constexpr int tokens_per_cta = TOKENS;   // 1 or 2
constexpr int ctas_per_token = CLUSTER;  // each stages the whole row and quantizes a part of it
constexpr int slots_per_cta = SLOTS;     // k-blocks that a CTA works on at a time; threads beyond only stage
constexpr int blocks_per_lane = BLOCKS;  // k-blocks that a lane keeps in registers
constexpr bool in_passes = PASSES;       // rows too long for that are transformed twice

constexpr bool has_norm = prologue == NORM || prologue == ADD_NORM;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool overlaps = false;
#else
constexpr bool overlaps = true;  // this kernel may start before the previous one has ended
#endif
constexpr bool weight_ahead = overlaps && channels_per_lane == 4;  // with many tokens occupancy is worth more
constexpr bool ahead = overlaps && has_table && !in_passes && blocks_per_lane * channels_per_lane * tokens_per_cta <= 16;  // indices fit into registers
constexpr int block_channels = 128;
constexpr int lanes_per_block = block_channels / channels_per_lane;
constexpr int groups_per_block = block_channels / group;
constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr Index sign_bit = (Index)(1u << (8 * sizeof(Index) - 1));
constexpr float grid_high = element == INT4 ? 7.0f : element == INT8 ? 127.0f : 6.0f;
constexpr float grid_low = element == INT4 ? -8.0f : -grid_high;  // a clipped range reaches beyond -7
constexpr float int8_high = 127.0f;

// What one CTA shares of each token. The rows follow, channel by channel; behind them come zeros that padding channels gather.
struct Shared {
  float partial_sums[32];  // one of each warp, of the squares of the row
  unsigned absmax[2][32];  // one of each warp, of the body and of the outliers, as ordered integers
};

struct Shape {
  int channels, body, body_blocks, blocks;

  __device__ __forceinline__ Shape(int channels, int body)
      : channels(channels), body(body), body_blocks((body + block_channels - 1) / block_channels),
        blocks(body_blocks + (channels - body + block_channels - 1) / block_channels) {}
};

struct Range {
  float low, high;
};

// ---------------------------------------------------------------------------------------------------- stage

template <int count> struct alignas(sizeof(Input) * count) Chunk {
  Input values[count];
};
constexpr int stage_width = aligned ? 16 / sizeof(Input) : 1;
using StageChunk = Chunk<stage_width>;
using Interleaved = Chunk<stage_width * tokens_per_cta>;

// Within two units of fp32's last place of the exact value: far inside what rounding to 16 bits leaves of it.
__device__ __forceinline__ float silu(float gate) { return __fdividef(gate, 1.0f + __expf(-gate)); }

// Sums of each token over the CTA.
__device__ __forceinline__ void sum_over_cta(float (&sums)[tokens_per_cta], Shared* shared) {
#pragma unroll
  for (int t = 0; t < tokens_per_cta; t++) {
    for (int distance = 16; distance; distance /= 2) sums[t] += __shfl_xor_sync(all_lanes, sums[t], distance);
    if (threadIdx.x % 32 == 0) shared[t].partial_sums[threadIdx.x / 32] = sums[t];
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < tokens_per_cta; t++) {
    sums[t] = threadIdx.x % 32 < blockDim.x / 32 ? shared[t].partial_sums[threadIdx.x % 32] : 0.0f;
    for (int distance = 16; distance; distance /= 2) sums[t] += __shfl_xor_sync(all_lanes, sums[t], distance);
  }
}

// The rows that a CTA reads and writes: `exist` of them, at these strides.
struct Rows {
  const Input *x, *other, *norm_weight;
  Input *residual_out, *row_out;
  int x_stride, other_stride, channels, exist;
  bool writes;  // one CTA of a cluster puts out what the layer's input is
};

// Brings the tokens' rows into shared memory, rounded to the input's dtype wherever torch would hold them in a tensor.
__device__ __forceinline__ void stage_rows(Input* staged, Shared* shared, const Rows& rows, const StageChunk& first_weight, float epsilon, int unit_offset) {
  const int channels = rows.channels;
  float squares[tokens_per_cta] = {};
  for (int channel = threadIdx.x * stage_width; channel < channels; channel += blockDim.x * stage_width) {
    Interleaved mixed;
#pragma unroll
    for (int t = 0; t < tokens_per_cta; t++) {
      StageChunk in = {}, second = {}, out;
      if (t < rows.exist) {
        in = *reinterpret_cast<const StageChunk*>(rows.x + (size_t)t * rows.x_stride + channel);
        if (prologue == ADD_NORM || prologue == SILU_MUL)
          second = *reinterpret_cast<const StageChunk*>(rows.other + (size_t)t * rows.other_stride + channel);
      }
#pragma unroll
      for (int i = 0; i < stage_width; i++) {
        float value = to_float(in.values[i]);
        if (prologue == ADD_NORM) value = rounded<Input>(value + to_float(second.values[i]));
        if (prologue == SILU_MUL) value = rounded<Input>(silu(value)) * to_float(second.values[i]);
        if (has_norm) squares[t] += value * value;
        out.values[i] = mixed.values[i * tokens_per_cta + t] = from_float<Input>(value);
      }
      size_t offset = (size_t)t * channels + channel;
      if (prologue == ADD_NORM && rows.writes && t < rows.exist) *reinterpret_cast<StageChunk*>(rows.residual_out + offset) = out;
      if (prologue == SILU_MUL && rows.writes && rows.row_out && t < rows.exist) *reinterpret_cast<StageChunk*>(rows.row_out + offset) = out;
    }
    *reinterpret_cast<Interleaved*>(staged + channel * tokens_per_cta) = mixed;
  }
  if (threadIdx.x < tokens_per_cta) staged[channels * tokens_per_cta + threadIdx.x] = from_float<Input>(0.0f);
  if (has_norm) {
    sum_over_cta(squares, shared);
    float inverse[tokens_per_cta];
#pragma unroll
    for (int t = 0; t < tokens_per_cta; t++) inverse[t] = rsqrtf(squares[t] / (float)channels + epsilon);
    for (int channel = threadIdx.x * stage_width; channel < channels; channel += blockDim.x * stage_width) {
      Interleaved mixed = *reinterpret_cast<Interleaved*>(staged + channel * tokens_per_cta);
      StageChunk weight = first_weight;
      if (!weight_ahead || channel >= blockDim.x * stage_width) weight = *reinterpret_cast<const StageChunk*>(rows.norm_weight + channel);
#pragma unroll
      for (int t = 0; t < tokens_per_cta; t++) {
        StageChunk out;
#pragma unroll
        for (int i = 0; i < stage_width; i++) {
          float value = to_float(mixed.values[i * tokens_per_cta + t]) * inverse[t], scale = to_float(weight.values[i]);
          // Gemma keeps fp32 up to the product and stores its weights minus one; everybody else rounds in between.
          value = unit_offset ? value * (1.0f + scale) : rounded<Input>(value) * scale;
          out.values[i] = mixed.values[i * tokens_per_cta + t] = from_float<Input>(value);
        }
        if (rows.row_out && rows.writes && t < rows.exist) *reinterpret_cast<StageChunk*>(rows.row_out + (size_t)t * channels + channel) = out;
      }
      *reinterpret_cast<Interleaved*>(staged + channel * tokens_per_cta) = mixed;
    }
  }
  __syncthreads();
}

// ------------------------------------------------------------------------------------------------ transform

// Channels of a k-block that exist: 128 but for the last block of the body and of the outliers.
__device__ __forceinline__ int channels_of(int block, const Shape& shape) {
  int end = block < shape.body_blocks ? shape.body - block * block_channels
                                      : shape.channels - shape.body - (block - shape.body_blocks) * block_channels;
  return min(end, block_channels);
}

__device__ __forceinline__ int first_channel(int block, const Shape& shape) {
  return block < shape.body_blocks ? block * block_channels : shape.body + (block - shape.body_blocks) * block_channels;
}

using Values = float[channels_per_lane];

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

// The lane's channels of one k-block of each token, in the layout's order; padding channels are zero.
__device__ __forceinline__ void gather(Values (&values)[tokens_per_cta], const Input* staged, const Index* table, const LaneIndices& known, int block,
                                       int position, const Shape& shape) {
  if (has_table) {
#pragma unroll
    for (int i = 0; i < channels_per_lane; i += 4) {
      Indices four = ahead ? known[i / 4] : *reinterpret_cast<const Indices*>(table + block * block_channels + position + i);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int channel = four.index[j] & (Index)~sign_bit;
        Chunk<tokens_per_cta> of_all = *reinterpret_cast<const Chunk<tokens_per_cta>*>(staged + channel * tokens_per_cta);
#pragma unroll
        for (int t = 0; t < tokens_per_cta; t++) {
          float value = to_float(of_all.values[t]);
          values[t][i + j] = four.index[j] & sign_bit ? -value : value;
        }
      }
    }
  } else {
    int exist = channels_of(block, shape) - position;
    const Input* source = staged + (first_channel(block, shape) + position) * tokens_per_cta;
#pragma unroll
    for (int i = 0; i < channels_per_lane; i += 4) {
      if (aligned && exist >= channels_per_lane) {
        Chunk<4 * tokens_per_cta> four = *reinterpret_cast<const Chunk<4 * tokens_per_cta>*>(source + i * tokens_per_cta);
#pragma unroll
        for (int j = 0; j < 4 * tokens_per_cta; j++) values[j % tokens_per_cta][i + j / tokens_per_cta] = to_float(four.values[j]);
      } else {
#pragma unroll
        for (int j = 0; j < 4 * tokens_per_cta; j++)
          values[j % tokens_per_cta][i + j / tokens_per_cta] = i + j / tokens_per_cta < exist ? to_float(source[i * tokens_per_cta + j]) : 0.0f;
      }
    }
  }
}

// Size of the Hadamard block that a channel of a ragged k-block lies in: the bits of `exist`, largest first. The block is
// named by the highest bit in which `exist` and the position differ.
__device__ __forceinline__ int hadamard_size(int position, int exist) { return 1 << (31 - __clz((position ^ exist) | 1)); }

// 1 / sqrt(size), rounded to fp32: exact powers of two, times sqrt(1/2) for the odd ones.
__device__ __forceinline__ float hadamard_factor(int size) {
  int exponent = 31 - __clz(size);
  float power = __uint_as_float((unsigned)(127 - exponent / 2) << 23);
  return exponent % 2 ? __fmul_rn(power, 0.70710678118654752f) : power;
}

// Butterflies from distance 1 upwards, the factor last: the order is part of the contract (formats/groups.py).
template <bool ragged> __device__ __forceinline__ void hadamard(Values& values, int position, int exist) {
#pragma unroll
  for (int distance = 1; distance < block_channels; distance *= 2) {
    if (distance < channels_per_lane) {
#pragma unroll
      for (int i = 0; i < channels_per_lane; i++) {
        if (i & distance) continue;
        float low = values[i], high = values[i + distance];
        if (ragged && hadamard_size(position + i, exist) <= distance) continue;
        values[i] = __fadd_rn(low, high);
        values[i + distance] = __fsub_rn(low, high);
      }
    } else {
      float sign = position & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < channels_per_lane; i++) {
        float partner = __shfl_xor_sync(all_lanes, values[i], distance / channels_per_lane);
        float sum = __fmaf_rn(values[i], sign, partner);  // the product is exact
        values[i] = ragged && hadamard_size(position + i, exist) <= distance ? values[i] : sum;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < channels_per_lane; i++) {
    int size = ragged ? hadamard_size(position + i, exist) : block_channels;
    values[i] = __fmul_rn(values[i], hadamard_factor(size));
  }
}

__device__ __forceinline__ void transform(Values (&values)[tokens_per_cta], const Input* staged, const Index* table, const LaneIndices& known, int block,
                                          int position, const Shape& shape) {
  if (block < shape.blocks) {
    gather(values, staged, table, known, block, position, shape);
  } else {
#pragma unroll
    for (int i = 0; i < channels_per_lane * tokens_per_cta; i++) values[i % tokens_per_cta][i / tokens_per_cta] = 0.0f;
  }
  if (has_hadamard) {
    int exist = block < shape.blocks ? channels_of(block, shape) : block_channels;
    bool ragged = __any_sync(all_lanes, exist != block_channels);
#pragma unroll
    for (int t = 0; t < tokens_per_cta; t++) {
      if (ragged) hadamard<true>(values[t], position, exist);
      else hadamard<false>(values[t], position, exist);
    }
  }
}

#include "quantize_encode.cuh"

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

// Where codes and scales go: the body's k-blocks, the outliers', and the scales, of tokens padded to so many.
struct Operand {
  unsigned char *codes, *outlier_codes;
  float *token_scale, *outlier_scale;
  unsigned char* group_scales;
  int padded_tokens;
};

// The CTAs that share a token: each warp's maxima of the body and of the outliers, and the barrier that counts them.
struct Cluster {
  unsigned rank;
  uint2 (*maxima)[32];
  unsigned long long& landed;
};

// The staged rows of the tokens from `first_token` on, as operand rows and scales.
__device__ __forceinline__ void quantize_staged(const Operand& to, const Input* staged, Shared* shared, const Index* table, const Ahead& known,
                                                const Lane& lane, const Shape& shape, const Factors& factors, int first_token, const Cluster& cluster) {
  float values[blocks_per_lane][tokens_per_cta][channels_per_lane];
  Range ranges[blocks_per_lane][tokens_per_cta];
  float absmax[tokens_per_cta] = {}, outlier_absmax[tokens_per_cta] = {};
  constexpr int together = blocks_per_lane * Lane::stride;  // k-blocks of a pass
  const int passes = in_passes ? (shape.blocks + together - 1) / together : 1;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
#pragma unroll
    for (int i = 0; i < blocks_per_lane; i++) {
      const int block = lane.slot + pass * together + i * Lane::stride;
      transform(values[i], staged, table, known.indices[i], block, lane.position, shape);
#pragma unroll
      for (int t = 0; t < tokens_per_cta; t++) {
        ranges[i][t] = group_range(values[i][t]);
        float reach = absmax_of(ranges[i][t]);
        absmax[t] = fmaxf(absmax[t], block < shape.body_blocks ? reach : 0.0f);
        outlier_absmax[t] = fmaxf(outlier_absmax[t], block < shape.body_blocks ? 0.0f : reach);
      }
    }
  }
  if (ctas_per_token > 1) {
    send_absmax(cluster.maxima[cluster.rank], absmax[0], outlier_absmax[0], cluster.landed);
    wait_for_bytes(cluster.landed);
    take_absmax(absmax[0], outlier_absmax[0], cluster.maxima[0]);
  } else {
#pragma unroll
    for (int t = 0; t < tokens_per_cta; t++) {
      share_absmax(shared[t].absmax[0], absmax[t]);
      share_absmax(shared[t].absmax[1], outlier_absmax[t]);
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < tokens_per_cta; t++) {
      absmax[t] = shared_absmax(shared[t].absmax[0]);
      outlier_absmax[t] = shared_absmax(shared[t].absmax[1]);
    }
  }

  float body_scale[tokens_per_cta], body_inverse[tokens_per_cta], outliers_inverse[tokens_per_cta];
#pragma unroll
  for (int t = 0; t < tokens_per_cta; t++) {
    body_scale[t] = token_scale_of(absmax[t], factors);
    body_inverse[t] = reciprocal_or_zero(body_scale[t]);
    float outliers_scale = __fmul_rn(outlier_absmax[t], per_int8);
    outliers_inverse[t] = reciprocal_or_zero(outliers_scale);
    if (threadIdx.x == 0 && cluster.rank == 0) {
      to.token_scale[first_token + t] = body_scale[t];
      to.outlier_scale[first_token + t] = outliers_scale;
    }
  }
  constexpr int scale_bytes = container == E4M3 ? 4 : scales == FP16_GROUP ? 2 : 1;
  constexpr bool has_group_scales = (scales == FP16_GROUP || scales == E8M0_GROUP || scales == E4M3_GROUP) && container != E4M3_SCALED && container != F16;
#pragma unroll 1
  for (int pass = 0; pass < passes; pass++) {
#pragma unroll
    for (int i = 0; i < blocks_per_lane; i++) {
      const int block = lane.slot + pass * together + i * Lane::stride;
      if (in_passes) {
        transform(values[i], staged, table, known.indices[i], block, lane.position, shape);
#pragma unroll
        for (int t = 0; t < tokens_per_cta; t++) ranges[i][t] = group_range(values[i][t]);
      }
      if (block >= shape.blocks) continue;
#pragma unroll
      for (int t = 0; t < tokens_per_cta; t++) {
        int token = first_token + t;
        unsigned codes[channels_per_lane];
        if (block < shape.body_blocks) {
          size_t scale_index = scale_address(block, lane.position / group, token, to.padded_tokens);
          encode_body(codes, values[i][t], ranges[i][t], body_scale[t], body_inverse[t], factors, to.group_scales + scale_index * scale_bytes,
                      has_group_scales && lane.position % group == 0);
          if (scales == TWO_LEVEL_ASYMMETRIC) {  // a zero channel of a ragged group has a level too, but its weight does not exist
            int exist = channels_of(block, shape) - lane.position;
#pragma unroll
            for (int j = 0; j < channels_per_lane; j++) codes[j] = j < exist ? codes[j] : 0u;
          }
          if (container == F16) store_halves(to.codes, codes, block, lane.position, token, to.padded_tokens);
          else if (container == NIBBLE) store_codes<4>(to.codes + nibble_address(block, lane.position, token, to.padded_tokens), codes);
          else store_codes<8>(to.codes + byte_address(block, lane.position, token, to.padded_tokens), codes);
        } else {
          encode_outliers(codes, values[i][t], outliers_inverse[t]);
          store_codes<8>(to.outlier_codes + byte_address(block - shape.body_blocks, lane.position, token, to.padded_tokens), codes);
        }
      }
    }
  }
}
