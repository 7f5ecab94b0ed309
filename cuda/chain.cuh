// Programmatic dependent launch: both are no-ops when the launch did not ask for overlap, and before sm_90.
#pragma once

// From here on, everything the previous kernel in the stream wrote is visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start to occupy what this one leaves free; it waits by itself for what this one writes.
__device__ __forceinline__ void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
