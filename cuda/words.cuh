// Words of 32 bits, by one instruction where the compiler does not find it.
#pragma once

// The bytes of a, 0 ... 3, and of b, 4 ... 7, that the nibbles of `selector` name, the lowest first.
__device__ __forceinline__ unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  unsigned result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

// (word & mask) | base. The instruction takes one constant; written out, two of them become two instructions.
__device__ __forceinline__ unsigned masked_onto(unsigned word, unsigned mask, unsigned base) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(base));
  return result;
}
