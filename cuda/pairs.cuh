// Two 16-bit floats in a word, the first in its low half; sums and products rounded once, as torch rounds a 16-bit tensor.
#pragma once

#include "numbers.cuh"
#include "words.cuh"

template <class Number> struct Pair;

template <> struct Pair<bf16> {
  static __device__ __forceinline__ float first(unsigned word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float second(unsigned word) { return __uint_as_float(word & 0xFFFF0000u); }
  static __device__ __forceinline__ unsigned of(float first, float second) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
  }
  static __device__ __forceinline__ unsigned add(unsigned a, unsigned b) { return fma(a, 0x3F803F80u, b); }
  static __device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) { return fma(a, b, 0x80008000u); }  // minus zero keeps the sign of zeros
  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned word;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
    return word;
  }
};

template <> struct Pair<fp16> {
  static __device__ __forceinline__ float first(unsigned word) { return half_to_float((unsigned short)word); }
  static __device__ __forceinline__ float second(unsigned word) { return half_to_float((unsigned short)(word >> 16)); }
  static __device__ __forceinline__ unsigned of(float first, float second) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
  }
  static __device__ __forceinline__ unsigned add(unsigned a, unsigned b) {
    unsigned word;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
  static __device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
    unsigned word;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
  }
  static __device__ __forceinline__ unsigned fma(unsigned a, unsigned b, unsigned c) {
    unsigned word;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(c));
    return word;
  }
};
