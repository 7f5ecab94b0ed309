// Enough of CUDA C++ to run a kernel on a CPU, for correctness only: each thread of a block is a fiber that runs until it
// meets its warp (shuffles, votes) or its block (__syncthreads). Instructions of one architecture live in headers of
// their own, and the directory of this file holds their host versions.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <stdlib.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __restrict__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct Dim { unsigned x = 1, y = 1, z = 1; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline Dim threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) inline unsigned char shared_bytes[256 << 10];

// ------------------------------------------------------------------------------------------------------ fibers

namespace host {

struct Meeting { unsigned arrived = 0, generation = 0; };
struct Fiber { ucontext_t context; std::vector<char> stack; bool done = false; };

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline Meeting block_meeting, warp_meetings[32], named_meetings[16];
inline uint64_t exchange[32][32];
inline std::function<void()>* body;

inline void leave() { swapcontext(&fibers[current].context, &scheduler); }

inline void meet(Meeting& meeting, unsigned members) {
  unsigned generation = meeting.generation;
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    meeting.generation++;
  } else {
    while (meeting.generation == generation) leave();
  }
}

inline unsigned warp() { return current / 32; }
inline unsigned lane() { return current % 32; }
inline unsigned warp_size() { return min(32u, blockDim.x - warp() * 32); }
inline void meet_warp() { meet(warp_meetings[warp()], warp_size()); }

// Every lane's value, as the other lanes of the warp see it.
template <class T> const uint64_t* share(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  meet_warp();
  exchange[warp()][lane()] = bits;
  meet_warp();
  return exchange[warp()];
}

template <class T> T taken(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void enter() {
  (*body)();
  fibers[current].done = true;
  leave();
}

inline void run_block(unsigned threads, std::function<void()>& function) {
  body = &function;
  block_meeting = {};
  for (auto& meeting : warp_meetings) meeting = {};
  for (auto& meeting : named_meetings) meeting = {};
  fibers.resize(threads);
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(64 << 10);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.data(), 0, fiber.stack.size()};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool running = true; running;) {
    running = false;
    for (current = 0; current < threads; current++) {
      if (fibers[current].done) continue;
      running = true;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
    }
  }
}

// Runs a grid; arguments come as cuLaunchKernel takes them, one pointer each.
template <class... A, size_t... I> void launch(void (*kernel)(A...), Dim grid, unsigned threads, void** arguments, std::index_sequence<I...>) {
  gridDim = grid;
  blockDim = {threads, 1, 1};
  std::function<void()> call = [&] { kernel(*static_cast<std::decay_t<A>*>(arguments[I])...); };
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = {x, y, z};
        memset(shared_bytes, 0xA5, sizeof(shared_bytes));  // what a kernel forgets to write is not zero
        run_block(threads, call);
      }
}

template <class... A> void launch(void (*kernel)(A...), Dim grid, unsigned threads, void** arguments) {
  launch(kernel, grid, threads, arguments, std::index_sequence_for<A...>{});
}

}  // namespace host

// -------------------------------------------------------------------------------------------------- intrinsics

inline void __syncthreads() { host::meet(host::block_meeting, blockDim.x); }
inline void __syncwarp(unsigned = 0) { host::meet_warp(); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) { return host::taken<T>(host::share(value)[host::lane() ^ mask]); }
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const uint64_t* values = host::share(value);
  return unsigned(*std::max_element(values, values + host::warp_size()));
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  const uint64_t* values = host::share(value);
  return unsigned(*std::min_element(values, values + host::warp_size()));
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return host::taken<T>(host::share(value)[lane]); }
template <class T> T __shfl_up_sync(unsigned, T value, int distance) { return host::taken<T>(host::share(value)[max(0, (int)host::lane() - distance)]); }
inline int __any_sync(unsigned, int predicate) {
  const uint64_t* votes = host::share(predicate != 0);
  return std::any_of(votes, votes + host::warp_size(), [](uint64_t vote) { return vote != 0; });
}
inline unsigned atomicMax(unsigned* target, unsigned value) { unsigned old = *target; *target = max(old, value); return old; }
inline int atomicAdd(int* target, int value) { int old = *target; *target += value; return old; }
inline void __threadfence() {}
template <class T> T __ldcg(const T* from) { return *from; }

inline unsigned __float_as_uint(float value) { unsigned bits; memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(unsigned bits) { float value; memcpy(&value, &bits, 4); return value; }
inline int __float_as_int(float value) { return (int)__float_as_uint(value); }
inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __float2int_rn(float a) { return (int)nearbyintf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }
