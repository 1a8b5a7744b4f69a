// Launching kernels, and what they say to the kernels before and after them: programmatic dependent launch.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/cuda/runtime.h"

namespace inlay::cuda {

// `Kernel` is the kernel function itself, so each has a cache of its own.
template <auto Kernel>
KernelTraits kernel_traits(int threads, int shared_bytes) {
  static KernelCache cache;
  return kernel_traits(reinterpret_cast<const void*>(Kernel), cache, threads, shared_bytes);
}

// The numbers of a table's rows: there is a kernel for each.
template <typename Row, int Count>
constexpr auto row_numbers(const Row (&)[Count]) {
  return std::make_integer_sequence<int, Count>{};
}

// A kernel made ready for some parameters: how many blocks, and how to start them.
template <typename Params>
struct Launch {
  int64_t blocks;
  void (*start)(const Params& params, int64_t blocks, void* stream);
};

// Starts `Kernel`, which calls wait_for_predecessor() before it touches memory, with a size and shared memory that are
// known at run time. `shared_limit`: what it never asks more than. `cluster`: so many neighbouring blocks of the first
// dimension run at the same time and may wait for each other; more than one only where the kernel has dependent launch,
// which is on the same GPUs.
template <auto Kernel, typename Params>
void start_sized(const Params& params, dim3 grid, int threads, int shared_bytes, int shared_limit, void* stream,
                 int cluster = 1) {
  static_assert(std::is_same_v<decltype(Kernel), void (*)(Params)>);
  start_kernel(reinterpret_cast<const void*>(Kernel), kernel_traits<Kernel>(threads, shared_limit),
               const_cast<Params*>(&params), grid, threads, shared_bytes, cluster, stream);
}

// The same where both are known when it is compiled.
template <auto Kernel, int kThreads, int kSharedBytes = 0, typename Params>
void start(const Params& params, dim3 grid, void* stream, int cluster = 1) {
  start_sized<Kernel>(params, grid, kThreads, kSharedBytes, kSharedBytes, stream, cluster);
}

// A kernel that gives each piece of work a block of its own.
template <auto Kernel, int kThreads, typename Params>
Launch<Params> block_per_piece_launch(int64_t work) {
  return {work, [](const Params& params, int64_t blocks, void* stream) {
            start<Kernel, kThreads>(params, dim3(static_cast<unsigned>(blocks)), stream);
          }};
}

// A kernel whose blocks walk over `work` pieces: as many blocks as run at once, but none without work.
template <auto Kernel, int kThreads, int kSharedBytes, typename Params>
Launch<Params> resident_launch(int64_t work) {
  const int64_t resident =
      static_cast<int64_t>(multiprocessor_count()) * kernel_traits<Kernel>(kThreads, kSharedBytes).resident_blocks;
  const int64_t blocks = work < resident ? (work > 0 ? work : 1) : resident;
  return {blocks, [](const Params& params, int64_t blocks, void* stream) {
            start<Kernel, kThreads, kSharedBytes>(params, dim3(static_cast<unsigned>(blocks)), stream);
          }};
}

// Everything the kernel before this one wrote is visible after this, and everything it reads may be overwritten.
__device__ inline void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks be set up as soon as this kernel's last blocks run.
__device__ inline void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Says that this thread has got what it read of memory that another block of its cluster will overwrite; each must then
// wait as well. What this thread wrote is not made visible: a fence for the whole GPU would take longer than the reads.
// Whole warps must call, best behind a __syncthreads().
__device__ inline void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ inline void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What may be done before wait_for_predecessor().
__device__ inline void prefetch_to_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// At least as many blocks as run on the chip at once.
__device__ inline unsigned resident_blocks_bound(int threads) {
  unsigned multiprocessors;
  asm("mov.u32 %0, %%nsmid;" : "=r"(multiprocessors));
  return multiprocessors * (2048 / threads);
}

}  // namespace inlay::cuda
