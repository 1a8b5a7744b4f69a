// Launching kernels: error checks, what must be known of the device, and programmatic dependent launch.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

namespace inlay::cuda {

// torch's own STD_CUDA_CHECK needs a symbol that torch 2.11 does not export.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("inlay: ") + what + " failed: " + cudaGetErrorString(status));
  }
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline constexpr int kMaxDevices = 64;

// Of the current device, looked up once. None that is asked for is zero.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  static std::array<std::atomic<int>, kMaxDevices> values{};
  const int device = current_device();
  int value = values[device].load(std::memory_order_relaxed);
  if (value == 0) {
    check(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    values[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

inline int multiprocessor_count() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Whether kernels run there that are compiled for Hopper's own instructions.
inline bool is_hopper() { return device_attribute<cudaDevAttrComputeCapabilityMajor>() == 9; }

// What one kernel can do on the current device, looked up once.
struct KernelTraits {
  int resident_blocks = 0;        // of a multiprocessor
  bool dependent_launch = false;  // its code has griddepcontrol, so it may start before its predecessor has ended
};

// `Kernel` is the kernel function itself, so each has a cache of its own.
template <auto Kernel>
const KernelTraits& kernel_traits(int threads, int shared_bytes) {
  static std::array<KernelTraits, kMaxDevices> traits{};
  static std::array<std::atomic<bool>, kMaxDevices> known{};
  const int device = current_device();
  if (!known[device].load(std::memory_order_acquire)) {
    KernelTraits found;
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, Kernel), "loading a kernel for this GPU");
    found.dependent_launch = attributes.ptxVersion >= 90;
    if (shared_bytes > 0) {  // more than the 48 KiB a block gets without asking, its static arrays counted in
      check(cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
            "raising a kernel's shared memory limit");
    }
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found.resident_blocks, Kernel, threads, shared_bytes),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    traits[device] = found;  // racing threads write the same values
    known[device].store(true, std::memory_order_release);
  }
  return traits[device];
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
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = !kernel_traits<Kernel>(threads, shared_limit).dependent_launch ? 0 : cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, Kernel, params), "launching a kernel");
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
