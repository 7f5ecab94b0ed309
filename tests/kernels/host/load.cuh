// The host's version of cuda/load.cuh: addresses count from the block's shared memory, and what waits lets others run.
// Bulk copies and clusters are not here: no kernel that runs on the emulator uses them.
#pragma once
#include "chain.cuh"

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

#define INLINE inline

INLINE uint32 shared_address(const void* pointer) { return static_cast<uint32>(static_cast<const uint8*>(pointer) - shared_bytes); }

namespace host {

// An mbarrier: arrivals that a phase takes, arrivals so far, phases that are over.
struct Barrier {
    uint16 members, arrived;
    uint32 phase;
};
static_assert(sizeof(Barrier) == sizeof(uint64));
INLINE Barrier& barrier_at(uint64& word) { return reinterpret_cast<Barrier&>(word); }

}  // namespace host

INLINE void barrier_init(uint64& barrier, uint32 count) { host::barrier_at(barrier) = {static_cast<uint16>(count), 0, 0}; }
INLINE void barrier_init_fence() {}
INLINE void barrier_arrive(uint64& word) {
    host::Barrier& barrier = host::barrier_at(word);
    if (++barrier.arrived < barrier.members) return;
    barrier.arrived = 0;
    barrier.phase++;
}
INLINE void barrier_wait(uint64& barrier, uint32 parity) {
    while (host::barrier_at(barrier).phase % 2 == parity) host::leave();
}

INLINE void named_barrier_sync(int id, int threads) { host::meet(host::named_meetings[id], threads); }

template <int COUNT> INLINE void give_registers() {}
template <int COUNT> INLINE void take_registers() {}
