// Number formats: how 16-bit floats, E4M3, E8M0 and E2M1 are read and written. Rounding is to nearest, ties to even.
// Conversions that every architecture has are instructions; the narrow ones are spelled out, because sm_80 to sm_90
// have none and the codes must be the same everywhere.
#pragma once

#include "conversions.cuh"

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
__device__ __forceinline__ float to_float(fp16 value) { return half_to_float(value.bits); }

template <class Number> __device__ __forceinline__ Number from_float(float value);
template <> __device__ __forceinline__ float from_float<float>(float value) { return value; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float value) { return {float_to_bfloat(value)}; }
template <> __device__ __forceinline__ fp16 from_float<fp16>(float value) { return {float_to_half(value)}; }

// The value after a round trip through a storage type: what a 16-bit tensor between two torch operators would hold.
template <class Number> __device__ __forceinline__ float rounded(float value) { return to_float(from_float<Number>(value)); }

// 1 / scale, and 0 for a scale that counts as zero (formats/grids.py, SMALLEST_SCALE).
__device__ __forceinline__ float reciprocal_or_zero(float scale) {
  return fabsf(scale) >= 1e-30f ? __frcp_rn(scale) : 0.0f;
}

// E4M3 code of a value in [0, 448].
__device__ __forceinline__ unsigned e4m3_code(float value) {
  if (value < 0.015625f) return (unsigned)__float2int_rn(__fmul_rn(value, 512.0f));  // below 2^-6 codes are linear
  unsigned bits = __float_as_uint(value);
  bits += 0x7FFFFu + (bits >> 20 & 1u);
  return (bits >> 20) - (120u << 3);  // exponent bias 127 becomes 7
}

__device__ __forceinline__ float e4m3_value(unsigned code) {
  if (code < 8u) return (float)code * 0.001953125f;
  return __uint_as_float((code + (120u << 3)) << 20);
}

// Biased exponent of the power-of-two scale of an E2M1 group: floor(log2(absmax)) - 2, one more from a mantissa of 1.75
// on, so that the largest value is at most 7 in units of the scale.
__device__ __forceinline__ unsigned e8m0_code(float absmax) {
  int exponent = (int)((__float_as_uint(absmax) + 0x00200000u) >> 23) - 2;
  return exponent > 0 ? (unsigned)exponent : 0u;
}

__device__ __forceinline__ float e8m0_value(unsigned code) {
  return code ? __uint_as_float(code << 23) : 5.877471754111438e-39f;  // 2^-127 is subnormal
}

// E2M1 code, sign | exponent | mantissa in the low four bits; saturates at 6, and zero has no sign.
__device__ __forceinline__ unsigned e2m1_code(float value) {
  float magnitude = fabsf(value);
  int index = magnitude < 2.0f   ? __float2int_rn(magnitude * 2.0f)
              : magnitude < 4.0f ? __float2int_rn(magnitude) + 2
                                 : __float2int_rn(fminf(magnitude, 6.0f) * 0.5f) + 4;
  return (unsigned)index | (value < 0.0f && index > 0 ? 8u : 0u);
}

__device__ __forceinline__ float e2m1_magnitude(unsigned code) { return __fmul_rn(e4m3_value((code & 7u) << 2), 64.0f); }

// Bytes that an e4m3 multiplier reads: E2M1 scaled by 2^-6, and a small integer in sign and magnitude scaled by 2^-9.
__device__ __forceinline__ unsigned e4m3_of_e2m1(unsigned code) { return (code & 8u) << 4 | (code & 7u) << 2; }
// The same with a power of two, rounded to the nearest e4m3 number.
__device__ __forceinline__ unsigned e4m3_of_e2m1(unsigned code, float power) {
  return (code & 8u) << 4 | e4m3_code(__fmul_rn(e4m3_value((code & 7u) << 2), power));
}
// An E2M1 code times an E4M3 scale: six bits of significand, which fp16 holds.
__device__ __forceinline__ unsigned half_of_e2m1(unsigned code, float scale) {
  return (code & 8u) << 12 | float_to_half(__fmul_rn(e2m1_magnitude(code), scale));
}
__device__ __forceinline__ unsigned e4m3_of_integer(int value) { return value < 0 ? 0x80u | (unsigned)-value : (unsigned)value; }
