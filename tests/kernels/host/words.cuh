// The host's version of cuda/words.cuh.
#pragma once

inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

inline unsigned masked_onto(unsigned word, unsigned mask, unsigned base) { return word & mask | base; }
