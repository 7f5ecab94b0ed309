// The host's version of cuda/pairs.cuh.
#pragma once

#include "numbers.cuh"

inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

template <class Number> struct Pair {
  static float first(unsigned word) { return to_float(Number{(unsigned short)word}); }
  static float second(unsigned word) { return to_float(Number{(unsigned short)(word >> 16)}); }
  static unsigned of(float first, float second) { return from_float<Number>(first).bits | (unsigned)from_float<Number>(second).bits << 16; }
  static unsigned add(unsigned a, unsigned b) { return of(first(a) + first(b), second(a) + second(b)); }
  static unsigned multiply(unsigned a, unsigned b) { return of(first(a) * first(b), second(a) * second(b)); }
};
