// From transformed channels to scales and codes, and where they are stored: the part of quantize_transform.cuh that is
// the rule of atomcli/formats/activations.py. Its parameters are the including file's.
#pragma once

// -------------------------------------------------------------------------------------------------- measure

// Floats as unsigned integers in the same order; without a sign they are in order as they are.
__device__ __forceinline__ unsigned ordered(float value) {
  unsigned bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}
__device__ __forceinline__ float unordered(unsigned bits) { return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu)); }

// The range of each group, known to all its lanes; where there is one scale for the whole token, of the lane's own
// channels. Symmetric grids: high is the absolute maximum, low is unused.
__device__ __forceinline__ Range group_range(const Values& values) {
  constexpr bool asymmetric = scales == TWO_LEVEL_ASYMMETRIC;
  constexpr int lanes_per_group = group / channels_per_lane;
  Range range = {values[0], asymmetric ? values[0] : fabsf(values[0])};
#pragma unroll
  for (int i = 1; i < channels_per_lane; i++) {
    if (asymmetric) range.low = fminf(range.low, values[i]);
    range.high = fmaxf(range.high, asymmetric ? values[i] : fabsf(values[i]));
  }
  if (scales == PER_TOKEN) return range;
  if (lanes_per_group == 32) {
    if (!asymmetric) return {0.0f, __uint_as_float(__reduce_max_sync(all_lanes, __float_as_uint(range.high)))};
    return {unordered(__reduce_min_sync(all_lanes, ordered(range.low))), unordered(__reduce_max_sync(all_lanes, ordered(range.high)))};
  }
#pragma unroll
  for (int distance = 1; distance < lanes_per_group; distance *= 2) {
    if (asymmetric) range.low = fminf(range.low, __shfl_xor_sync(all_lanes, range.low, distance));
    range.high = fmaxf(range.high, __shfl_xor_sync(all_lanes, range.high, distance));
  }
  return range;
}

__device__ __forceinline__ float absmax_of(const Range& range) {
  return scales == TWO_LEVEL_ASYMMETRIC ? fmaxf(fabsf(range.low), fabsf(range.high)) : range.high;
}

// Every lane's absolute maximum to its warp's slot; after the block has met, that of all slots.
__device__ __forceinline__ void share_absmax(unsigned (&slots)[32], float absmax) {
  unsigned bits = __reduce_max_sync(all_lanes, __float_as_uint(absmax));
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = bits;
}
__device__ __forceinline__ float shared_absmax(const unsigned (&slots)[32]) {
  unsigned bits = threadIdx.x % 32 < blockDim.x / 32 ? slots[threadIdx.x % 32] : 0;
  return __uint_as_float(__reduce_max_sync(all_lanes, bits));
}

// --------------------------------------------------------------------------------------------------- encode

// The nearest integer, ties to even, of a number far below 2^22: from 1.5 * 2^23 on the last place of a float is one. A
// conversion would take its turn in a unit that is slower than the adders.
__device__ __forceinline__ int nearest(float ratio) { return __float_as_int(__fadd_rn(ratio, 12582912.0f)) - 0x4B400000; }
__device__ __forceinline__ int nearest(float ratio, float low, float high) { return nearest(fminf(fmaxf(ratio, low), high)); }

__device__ __forceinline__ unsigned code_of(float ratio) {
  if (element == FLOAT) return float_to_half(ratio);
  if (element == E2M1) {
    unsigned code = e2m1_code(ratio);
    return container == E4M3 ? e4m3_of_e2m1(code) : code;
  }
  int code = clips ? nearest(ratio, grid_low, grid_high) : nearest(ratio);
  return container == E4M3 ? e4m3_of_integer(code) : (unsigned)code;
}

// The numbers that a format's clip ratio makes of a range, computed on the host in double precision.
struct Factors {
  float clip, token, group;  // PER_TOKEN, TWO_LEVEL: absmax to token scale; FP16_GROUP, TWO_LEVEL: to group scale
};

constexpr float per_int8 = (float)(1.0 / 127), per_e2m1 = (float)(1.0 / 6), per_level = (float)(1.0 / 15);
constexpr float per_e4m3_of_e2m1 = (float)(1.0 / (6 * (adaptive ? 256 : 448)));  // 256 and 1.5 times it are E4M3 numbers

// The power of two that brings an absolute maximum between 2^14 and 2^15: as large as fp16 holds it, and 16-bit numbers
// divided by it come out as they are.
__device__ __forceinline__ float power_scale(float absmax) {
  int exponent = (int)(__float_as_uint(absmax) >> 23) - 14;
  return absmax > 0.0f ? __uint_as_float((unsigned)max(exponent, 1) << 23) : 0.0f;
}

// Powers of two of a token's groups as e4m3 numbers: the token's largest is 2^6, so that 6 times it is one; what lies 14
// octaves below it is exact, what lies deeper within 2^-18 of the token's largest value.
constexpr int scaled_exponent = 12;  // of the largest power, counted from the first whose 0.5 is a normal number

__device__ __forceinline__ float scaled_unit(unsigned largest_exponent) {
  return __uint_as_float((max(largest_exponent, 7u) - 6u) << 23);  // the unit of codes, 2^6, at 2^6
}
__device__ __forceinline__ float scaled_power(unsigned exponent, float unit) {
  int shifted = (int)exponent - (int)(__float_as_uint(unit) >> 23) - 6 + scaled_exponent + 127;
  return shifted > 0 ? __uint_as_float((unsigned)shifted << 23) : 0.0f;
}

// The token's scale: of the codes (PER_TOKEN), of the integers (TWO_LEVEL), of the group scales (E4M3_GROUP), or of codes
// that hold their group's scale (E8M0_GROUP).
__device__ __forceinline__ float token_scale_of(float absmax, const Factors& factors) {
  switch (scales) {
    case PER_TOKEN:
    case TWO_LEVEL: return element == FLOAT ? power_scale(absmax) : __fmul_rn(absmax, factors.token);
    case TWO_LEVEL_ASYMMETRIC: return __fmul_rn(__fmul_rn(absmax, factors.clip), per_int8);
    case E4M3_GROUP: return __fmul_rn(__fmul_rn(absmax, factors.clip), per_e4m3_of_e2m1);
    case E8M0_GROUP: return container == E4M3_SCALED ? scaled_unit(e8m0_code(__fmul_rn(absmax, factors.clip))) : 1.0f;
    default: return 1.0f;
  }
}

// Squared error of a group in E2M1 with a scale: neighbours are added first, then neighbouring pairs, as the rule does.
__device__ __forceinline__ float e2m1_error(const Values& values, float scale) {
  float inverse = reciprocal_or_zero(scale), errors[channels_per_lane];
#pragma unroll
  for (int i = 0; i < channels_per_lane; i++) {
    float magnitude = fabsf(values[i]);
    float error = __fsub_rn(__fmul_rn(e2m1_magnitude(e2m1_code(__fmul_rn(magnitude, inverse))), scale), magnitude);
    errors[i] = __fmul_rn(error, error);
  }
#pragma unroll
  for (int distance = 1; distance < group; distance *= 2) {
    if (distance < channels_per_lane) {
#pragma unroll
      for (int i = 0; i < channels_per_lane; i += 2 * distance) errors[i] = __fadd_rn(errors[i], errors[i + distance]);
    } else {
      errors[0] = __fadd_rn(errors[0], __shfl_xor_sync(all_lanes, errors[0], distance / channels_per_lane));
    }
  }
  return errors[0];
}

// Codes of the lane's channels; the first lane of a group stores the group's scale.
__device__ __forceinline__ void encode_body(unsigned (&codes)[channels_per_lane], const Values& values, Range range, float token_scale,
                                            float token_inverse, const Factors& factors, unsigned char* group_scale, bool stores_scale) {
  if (scales == PER_TOKEN) {
#pragma unroll
    for (int i = 0; i < channels_per_lane; i++) codes[i] = code_of(__fmul_rn(values[i], token_inverse));
  } else if (scales == TWO_LEVEL) {
    float multiplier = fminf(fmaxf(rintf(__fmul_rn(__fmul_rn(range.high, token_inverse), factors.group)), 1.0f), 15.0f);
    float inverse = __frcp_rn(multiplier);
#pragma unroll
    for (int i = 0; i < channels_per_lane; i++)
      codes[i] = (unsigned)((int)multiplier * nearest(__fmul_rn(__fmul_rn(values[i], token_inverse), inverse), grid_low, grid_high));
  } else if (scales == TWO_LEVEL_ASYMMETRIC) {
    float low = __fmul_rn(__fmul_rn(range.low, factors.clip), token_inverse);
    float high = __fmul_rn(__fmul_rn(range.high, factors.clip), token_inverse);
    float multiplier = fminf(fmaxf(rintf(__fmul_rn(__fsub_rn(high, low), per_level)), 1.0f), 17.0f);
    float offset = rintf(__fsub_rn(__fmul_rn(__fadd_rn(low, high), 0.5f), __fmul_rn(7.5f, multiplier)));
    offset = fminf(fmaxf(offset, -128.0f), 127.0f - 15.0f * multiplier);
    float inverse = __frcp_rn(multiplier);
#pragma unroll
    for (int i = 0; i < channels_per_lane; i++) {
      int level = nearest(__fmul_rn(__fsub_rn(__fmul_rn(values[i], token_inverse), offset), inverse), 0.0f, 15.0f);
      codes[i] = (unsigned)((int)multiplier * level + (int)offset);
    }
  } else {
    float scale;
    unsigned stored;
    if (scales == FP16_GROUP) {
      stored = float_to_half(__fmul_rn(range.high, factors.group));
      scale = half_to_float((unsigned short)stored);
    } else {
      float absmax = __fmul_rn(range.high, factors.clip);
      float ratio = __fmul_rn(__fmul_rn(absmax, per_e2m1), token_inverse);
      stored = scales == E8M0_GROUP ? e8m0_code(absmax) : e4m3_code(fminf(ratio, 448.0f));
      scale = scales == E8M0_GROUP ? e8m0_value(stored) : __fmul_rn(e4m3_value(stored), token_scale);
      if (adaptive) {
        unsigned on_four = e4m3_code(fminf(__fmul_rn(ratio, 1.5f), 448.0f));
        float wider = __fmul_rn(e4m3_value(on_four), token_scale);
        if (e2m1_error(values, wider) < e2m1_error(values, scale)) stored = on_four, scale = wider;
      }
    }
    if (stores_scale) {
      if (container == E4M3) *reinterpret_cast<float*>(group_scale) = scale;
      else if (scales == FP16_GROUP) *reinterpret_cast<unsigned short*>(group_scale) = (unsigned short)stored;
      else *group_scale = (unsigned char)stored;
    }
    float inverse = reciprocal_or_zero(scale);
#pragma unroll
    for (int i = 0; i < channels_per_lane; i++) {
      float ratio = __fmul_rn(values[i], inverse);
      if (container == E4M3_SCALED) codes[i] = e4m3_of_e2m1(e2m1_code(ratio), scaled_power(stored, token_scale));
      else if (container == F16 && scales == E4M3_GROUP) codes[i] = half_of_e2m1(e2m1_code(ratio), e4m3_value(stored));
      else codes[i] = code_of(ratio);
    }
  }
}

// None is beyond the 127 of its own scale.
__device__ __forceinline__ void encode_outliers(unsigned (&codes)[channels_per_lane], const Values& values, float inverse) {
#pragma unroll
  for (int i = 0; i < channels_per_lane; i++) codes[i] = (unsigned)nearest(__fmul_rn(values[i], inverse));
}

// ---------------------------------------------------------------------------------------------------- store

// `bits` of each code, packed into words and written as one access.
template <int bits> __device__ __forceinline__ void store_codes(unsigned char* target, const unsigned (&codes)[channels_per_lane]) {
  constexpr int bytes = channels_per_lane * bits / 8;
  constexpr unsigned mask = bits == 8 ? 0xFFu : 0xFu;
  unsigned words[(bytes + 3) / 4] = {};
#pragma unroll
  for (int i = 0; i < channels_per_lane; i++) words[i * bits / 32] |= (codes[i] & mask) << (i * bits % 32);
  if constexpr (bytes == 2) *reinterpret_cast<unsigned short*>(target) = (unsigned short)words[0];
  if constexpr (bytes == 4) *reinterpret_cast<unsigned*>(target) = words[0];
  if constexpr (bytes == 8) *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
  if constexpr (bytes == 16) *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
}

// fp16 numbers: a row of 128 bytes has 64 channels, so that a k-block is two operand blocks, one behind the other.
__device__ __forceinline__ void store_halves(unsigned char* operand, const unsigned (&codes)[channels_per_lane], int block, int position,
                                             int token, int padded_tokens) {
  constexpr int together = channels_per_lane < 8 ? channels_per_lane : 8;  // of a 16-byte chunk
#pragma unroll
  for (int i = 0; i < channels_per_lane; i += together) {
    unsigned words[4] = {};
#pragma unroll
    for (int j = 0; j < together; j++) words[j / 2] |= codes[i + j] << j % 2 * 16;
    int channel = position + i;
    size_t row = (size_t)(2 * block + channel / 64) * padded_tokens + token;
    unsigned char* target = operand + row * 128 + ((channel / 8 % 8 ^ (token & 7)) << 4) + channel % 8 * 2;
    if constexpr (together == 4) *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
    else *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// Address of a byte in a 128-byte operand row: chunk c of row r lies at c ^ (r % 8).
__device__ __forceinline__ size_t byte_address(int block, int position, int token, int padded_tokens) {
  size_t row = (size_t)block * padded_tokens + token;
  return row * 128 + (((position >> 4) ^ (token & 7)) << 4) + (position & 15);
}

// The same for 64-byte rows of 4-bit codes: chunk c of row r lies at c ^ (r / 2 % 4), free of bank conflicts for ldmatrix.
__device__ __forceinline__ size_t nibble_address(int block, int position, int token, int padded_tokens) {
  size_t row = (size_t)block * padded_tokens + token;
  return row * 64 + (((position >> 5) ^ (token >> 1 & 3)) << 4) + (position >> 1 & 15);
}

// Scales of 8-bit integers lie by group, then token; for other containers a token's scales of one k-block stay together.
__device__ __forceinline__ size_t scale_address(int block, int group_of_block, int token, int padded_tokens) {
  if (container != S8) return ((size_t)block * padded_tokens + token) * groups_per_block + group_of_block;
  return (size_t)(block * groups_per_block + group_of_block) * padded_tokens + token;
}

// -------------------------------------------------------------------------------------------- a token's part

// Where codes and scales go: the body's k-blocks, the outliers', and the scales, of tokens padded to so many.
struct Operand {
  unsigned char *codes, *outlier_codes;
  float *token_scale, *outlier_scale;
  unsigned char* group_scales;
  int padded_tokens;
};

// What a token's codes are made with; one over the outliers' scale serves the outliers.
struct TokenScale {
  float body, body_inverse, outliers_inverse;
};

// The lane's channels of one k-block, from `position` on.
__device__ __forceinline__ void encode(const Operand& to, const Values& values, Range range, const TokenScale& scale, const Factors& factors,
                                       const Shape& shape, int block, int position, int token) {
  constexpr int scale_bytes = container == E4M3 ? 4 : scales == FP16_GROUP ? 2 : 1;
  constexpr bool has_group_scales = (scales == FP16_GROUP || scales == E8M0_GROUP || scales == E4M3_GROUP) && container != E4M3_SCALED && container != F16;
  unsigned codes[channels_per_lane];
  if (block >= shape.body_blocks) {
    encode_outliers(codes, values, scale.outliers_inverse);
    store_codes<8>(to.outlier_codes + byte_address(block - shape.body_blocks, position, token, to.padded_tokens), codes);
    return;
  }
  size_t scale_index = scale_address(block, position / group, token, to.padded_tokens);
  encode_body(codes, values, range, scale.body, scale.body_inverse, factors, to.group_scales + scale_index * scale_bytes,
              has_group_scales && position % group == 0);
  if (scales == TWO_LEVEL_ASYMMETRIC) {  // a zero channel of a ragged group has a level too, but its weight does not exist
    int exist = channels_of(block, shape) - position;
#pragma unroll
    for (int i = 0; i < channels_per_lane; i++) codes[i] = i < exist ? codes[i] : 0u;
  }
  if (container == F16) store_halves(to.codes, codes, block, position, token, to.padded_tokens);
  else if (container == NIBBLE) store_codes<4>(to.codes + nibble_address(block, position, token, to.padded_tokens), codes);
  else store_codes<8>(to.codes + byte_address(block, position, token, to.padded_tokens), codes);
}
