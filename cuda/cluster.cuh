// Blocks of one cluster (sm_90 on): values sent into each other's shared memory, counted by a barrier of the receiver.
// On older architectures, and on the host, a cluster has one block, and nothing here is called.
#pragma once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CLUSTER_ASM(...) asm volatile(__VA_ARGS__)
__device__ __forceinline__ unsigned address_in_shared(const void* pointer) { return (unsigned)__cvta_generic_to_shared(pointer); }
#else
#define CLUSTER_ASM(...)
__device__ __forceinline__ unsigned address_in_shared(const void* pointer) { return 0; }
#endif

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  CLUSTER_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  CLUSTER_ASM("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// A barrier for one phase, over when so many bytes have landed. By one thread, before the cluster meets.
__device__ __forceinline__ void expect_bytes(unsigned long long& barrier, unsigned bytes) {
  CLUSTER_ASM("mbarrier.init.shared.b64 [%0], 1; fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
              ::"r"(address_in_shared(&barrier)), "r"(bytes) : "memory");
}

// Two words into the same place of another block of the cluster; counted by that block's own barrier.
__device__ __forceinline__ void send(const uint2* place, unsigned first, unsigned second, const unsigned long long& barrier, unsigned rank) {
  CLUSTER_ASM("{ .reg .b32 place, barrier; mapa.shared::cluster.u32 place, %0, %4; mapa.shared::cluster.u32 barrier, %1, %4;"
              " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [place], {%2, %3}, [barrier]; }"
              ::"r"(address_in_shared(place)), "r"(address_in_shared(&barrier)), "r"(first), "r"(second), "r"(rank) : "memory");
}

__device__ __forceinline__ void wait_for_bytes(unsigned long long& barrier) {
  CLUSTER_ASM("{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], 0; @!done bra again; }"
              ::"r"(address_in_shared(&barrier)) : "memory");
}
