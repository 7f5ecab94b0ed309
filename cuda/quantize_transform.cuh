// Of quantizing the input of a linear layer, what one token at a time (quantize_rows.cuh) and two (quantize_pairs.cu) share:
// the parameters, where channels lie, the Hadamard, and by quantize_encode.cuh the scales, the codes and where they go.
//
// The body's channels fill k-blocks of 128, padded with zero channels; the outliers fill k-blocks of their own after it.
// A block is worked on by 128 / CHANNELS neighbouring lanes, CHANNELS (4 or 16) consecutive channels each: few channels
// are quick for a single token, many need fewer shuffles. Arithmetic that decides a code is written with rounding
// intrinsics: a contraction to FMA would move codes.
#pragma once

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
constexpr bool adaptive = ADAPTIVE;      // of E4M3_GROUP: the largest value of a group is 6 or 4
constexpr int channels_per_lane = CHANNELS;

constexpr bool has_norm = prologue == NORM || prologue == ADD_NORM;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool overlaps = false;
#else
constexpr bool overlaps = true;  // this kernel may start before the previous one has ended
#endif
constexpr int block_channels = 128;
constexpr int lanes_per_block = block_channels / channels_per_lane;
constexpr int groups_per_block = block_channels / group;
constexpr unsigned all_lanes = 0xFFFFFFFFu;
constexpr Index sign_bit = (Index)(1u << (8 * sizeof(Index) - 1));
constexpr float grid_high = element == INT4 ? 7.0f : element == INT8 ? 127.0f : 6.0f;
constexpr float grid_low = element == INT4 ? -8.0f : -grid_high;  // a clipped range reaches beyond -7
constexpr bool clips = CLIPS || element != INT8;  // INT8 without a clip ratio reaches 127 and no further

struct Shape {
  int channels, body, body_blocks, blocks;

  __device__ __forceinline__ Shape(int channels, int body)
      : channels(channels), body(body), body_blocks((body + block_channels - 1) / block_channels),
        blocks(body_blocks + (channels - body + block_channels - 1) / block_channels) {}
};

struct Range {
  float low, high;
};

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

// Within a few units of fp32's last place of the exact value: far inside what rounding to 16 bits leaves of it.
__device__ __forceinline__ float silu(float gate) { return gate * reciprocal_approximate(1.0f + exp2_approximate(gate * -1.44269504f)); }

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
  // Of a lane's own channels only those of the lane in which the k-block ends lie in different Hadamard blocks.
  const int apart = position ^ exist, end = apart < channels_per_lane ? apart : channels_per_lane;
#pragma unroll
  for (int distance = 1; distance < block_channels; distance *= 2) {
    if (distance < channels_per_lane) {
#pragma unroll
      for (int i = 0; i < channels_per_lane; i++) {
        if (i & distance) continue;
        float low = values[i], high = values[i + distance];
        if (ragged && (i ^ end) < 2 * distance) continue;  // its Hadamard block is no larger
        values[i] = __fadd_rn(low, high);
        values[i + distance] = __fsub_rn(low, high);
      }
    } else {
      float sign = position & distance ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < channels_per_lane; i++) {
        float partner = __shfl_xor_sync(all_lanes, values[i], distance / channels_per_lane);
        float sum = __fmaf_rn(values[i], sign, partner);  // the product is exact
        values[i] = ragged && apart < 2 * distance ? values[i] : sum;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < channels_per_lane; i++) {
    int size = ragged ? hadamard_size(position + i, exist) : block_channels;
    values[i] = __fmul_rn(values[i], hadamard_factor(size));
  }
}

// The Hadamard of a k-block, if the layout has one; what lies beyond the blocks goes along.
__device__ __forceinline__ void rotate(Values& values, int block, int position, const Shape& shape) {
  if (!has_hadamard) return;
  const int exist = block < shape.blocks ? channels_of(block, shape) : block_channels;
  if (__any_sync(all_lanes, exist != block_channels)) hadamard<true>(values, position, exist);
  else hadamard<false>(values, position, exist);
}

#include "quantize_encode.cuh"
