// Moving data into an SM: shared memory addresses, barriers that count bytes, bulk copies, launch dependence.
#pragma once
#include "chain.cuh"

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

#define INLINE __device__ __forceinline__

INLINE uint32 shared_address(const void* pointer) { return static_cast<uint32>(__cvta_generic_to_shared(pointer)); }

// ---- mbarrier: a phase is over when `count` threads have arrived and all announced bytes have landed

INLINE void barrier_init(uint64& barrier, uint32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count));
}

INLINE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

INLINE void barrier_arrive_expecting(uint64& barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes) : "memory");
}

INLINE void barrier_arrive(uint64& barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Without qualifiers on purpose: `.release.cluster` would compile to a membar of the whole GPU for each arrival.
INLINE void barrier_arrive_remote(uint64& barrier, uint32 cluster_rank) {
    asm volatile("{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [remote]; }"
                 ::"r"(shared_address(&barrier)), "r"(cluster_rank) : "memory");
}

INLINE void barrier_wait(uint64& barrier, uint32 parity) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @!done bra again; }"
                 ::"r"(shared_address(&barrier)), "r"(parity) : "memory");
}

// ---- named barriers among some warps of a block; ids 1..15 (0 is __syncthreads)

INLINE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- bulk copies global -> shared: contiguous, multiples of 16 bytes, completing on a barrier

INLINE uint64 policy_evict_first() {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

INLINE uint64 policy_evict_last() {
    uint64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

INLINE void bulk_copy(void* destination, const void* source, uint32 bytes, uint64& barrier, uint64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(shared_address(destination)), "l"(source), "r"(bytes), "r"(shared_address(&barrier)), "l"(policy) : "memory");
}

// The same offset in every block of the cluster receives the bytes and counts them on its own barrier.
INLINE void bulk_copy_multicast(void* destination, const void* source, uint32 bytes, uint64& barrier, uint16 blocks, uint64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
                 " [%0], [%1], %2, [%3], %4, %5;"
                 ::"r"(shared_address(destination)), "l"(source), "r"(bytes), "r"(shared_address(&barrier)), "h"(blocks), "l"(policy)
                 : "memory");
}

// ---- registers per thread, for the whole warpgroup that executes it

template <int COUNT> INLINE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> INLINE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
