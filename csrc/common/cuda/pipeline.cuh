// Prefetching without registers: each thread copies what it will need later into shared memory of its own.
#pragma once

#include <cstdint>

#include "common/cuda/vector.cuh"

namespace inlay::cuda {

// Copies 16 bytes from global to shared memory in the background; sm_80 and later.
__device__ inline void copy_async(uint4* shared, const void* global) {
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global) : "memory");
}

// Ends a group of this thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread's copies are still under way.
template <int kPending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A thread's part of the rows under way, [stage][tensor][vector], strided by the block so that banks do not conflict.
// Nobody else reads it, so the pipeline needs no barrier.
template <int kTensors, int kVectors, int kThreads, int kStages>
struct RowBuffer {
  uint4 parts[kStages][kTensors][kVectors][kThreads];

  // Copies this thread's vectors of a row, every `group`th from `lane` on, in the background.
  template <typename T>
  __device__ void fetch(int stage, int tensor, const T* row, int lane, int group, int vectors) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int vector = lane + j * group;
      if (vector < vectors) copy_async(&parts[stage][tensor][j][threadIdx.x], row + vector * kPerAccess<T>);
    }
  }

  template <typename T>
  __device__ Packed<T, kPerAccess<T>> read(int stage, int tensor, int j) const {
    Packed<T, kPerAccess<T>> packed;  // through uint4: a Packed would be read element by element
    *reinterpret_cast<uint4*>(&packed) = parts[stage][tensor][j][threadIdx.x];
    return packed;
  }
};

}  // namespace inlay::cuda
