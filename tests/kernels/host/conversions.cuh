// The host's version of cuda/conversions.cuh, for kernels that run on the emulator.
#pragma once

inline float half_to_float(unsigned short value) {
  _Float16 half;
  memcpy(&half, &value, 2);
  return (float)half;
}

inline unsigned short float_to_half(float value) {
  _Float16 half = (_Float16)value;
  unsigned short bits;
  memcpy(&bits, &half, 2);
  return bits;
}

inline unsigned short float_to_bfloat(float value) {
  unsigned bits = __float_as_uint(value);
  return (unsigned short)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline float exp2_approximate(float value) { return exp2f(value); }
inline float log2_approximate(float value) { return log2f(value); }
inline float reciprocal_approximate(float value) { return 1.0f / value; }
