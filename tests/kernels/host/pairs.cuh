// The host's version of cuda/pairs.cuh.
#pragma once

#include "numbers.cuh"
#include "words.cuh"

template <class Number> struct Pair {
  static float first(unsigned word) { return to_float(Number{(unsigned short)word}); }
  static float second(unsigned word) { return to_float(Number{(unsigned short)(word >> 16)}); }
  static unsigned of(float first, float second) { return from_float<Number>(first).bits | (unsigned)from_float<Number>(second).bits << 16; }
  static unsigned add(unsigned a, unsigned b) { return of(first(a) + first(b), second(a) + second(b)); }
  static unsigned multiply(unsigned a, unsigned b) { return of(first(a) * first(b), second(a) * second(b)); }
  static unsigned fma(unsigned a, unsigned b, unsigned c) {
    return of((double)first(a) * first(b) + first(c), (double)second(a) * second(b) + second(c));
  }
};
