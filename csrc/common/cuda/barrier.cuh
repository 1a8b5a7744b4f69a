// Warps of a block with different work: barriers between some of them, and registers dealt out unevenly.
#pragma once

#include <cstdint>

#include "common/cuda/mma.cuh"

namespace inlay::cuda {

// In shared memory. Opens when all arrivals that it was made for have come and, on Hopper, all bytes of the bulk copies
// that were announced to it: once for phase 0, then for phase 1, and so on. What was written to shared memory before an
// arrival is visible after the wait.
struct Barrier {
  uint64_t state;
};

// By one thread; then publish_barriers() by that thread, and a __syncthreads().
__device__ __forceinline__ void init_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(shared_address(&barrier))
               : "memory");
}

// One arrival of a warp: of what all its lanes did before.
__device__ __forceinline__ void arrive_as_warp(Barrier& barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// An arrival that comes when the copy_async() of this thread are done.
__device__ __forceinline__ void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void wait_at(Barrier& barrier, int64_t phase) {
  const uint32_t address = shared_address(&barrier), parity = static_cast<uint32_t>(phase) & 1;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra DONE_%=; bra "
      "WAIT_%=; DONE_%=: }" ::"r"(address),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{ .reg .pred done; WAIT_%=: mbarrier.test_wait.parity.shared::cta.b64 done, [%0], %1; @done bra DONE_%=; bra "
      "WAIT_%=; DONE_%=: }" ::"r"(address),
      "r"(parity)
      : "memory");
#endif
}

#if __CUDA_ARCH__ >= 900
// For a wait that is long and not urgent: it leaves the issue slots to others.
__device__ __forceinline__ void wait_patiently(Barrier& barrier, int64_t phase) {
  const uint32_t parity = static_cast<uint32_t>(phase) & 1;
  uint32_t done = 0;
  while (true) {
    asm volatile(
        "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.b32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
    if (done) return;
    __nanosleep(64);
  }
}
#endif

// A plain barrier is one of a block's 16 by number, 0 being that of __syncthreads(). It opens when `threads` threads,
// those that only arrive included, have come; what they wrote to shared memory before is then visible.
__device__ __forceinline__ void meet_at(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_at(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The stages in turn, each with the number of times it was used before.
template <int kStages>
struct Turn {
  int stage = 0;
  int phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      ++phase;
    }
  }
};

// How many registers the threads of a warpgroup have from here on; all its warps call it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void leave_registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace inlay::cuda
