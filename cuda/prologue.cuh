// What is done to a row before a linear layer reads it, and how rows are read.
#pragma once

#include "numbers.cuh"

enum Prologue { PLAIN, NORM, ADD_NORM, SILU_MUL };

using Input = INPUT;  // float, fp16 or bf16
constexpr Prologue prologue = PROLOGUE;
constexpr bool aligned = ALIGNED;  // rows, parts of rows and pointers allow 16-byte accesses
constexpr bool has_norm = prologue == NORM || prologue == ADD_NORM;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool overlaps = false;
#else
constexpr bool overlaps = true;  // this kernel may start before the previous one has ended
#endif
constexpr unsigned all_lanes = 0xFFFFFFFFu;

// Within a few units of fp32's last place of the exact value: far inside what rounding to 16 bits leaves of it.
__device__ __forceinline__ float silu(float gate) { return gate * reciprocal_approximate(1.0f + exp2_approximate(gate * -1.44269504f)); }
