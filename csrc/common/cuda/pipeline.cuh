// Prefetching without registers: each thread copies what it will need later into shared memory of its own.
#pragma once

#include <cstdint>

namespace inlay::cuda {

// Copies kBytes (4 or 16) from global to shared memory in the background; sm_80 and later.
template <int kBytes>
__device__ inline void copy_async(void* shared, const void* global) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(global), "n"(kBytes) : "memory");
  }
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread's copies are still under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace inlay::cuda
