// Into L2, without waiting: an address that another kernel still writes is no harm, for L2 is where it writes.
#pragma once

// `bytes` from `from` on, both multiples of 16. By one thread. Nothing before sm_90.
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}
