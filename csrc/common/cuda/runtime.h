// The host's side of kernels: errors, what must be known of the device, and the call that starts one. Compiled once, in
// runtime.cpp: every .cu file includes this, and is parsed several times, so nothing large may come with it.
#pragma once

#include <cuda_runtime.h>

namespace inlay::cuda {

[[noreturn]] void fail(const char* message);
[[noreturn]] void fail_with(cudaError_t status, const char* what);

// torch's own STD_CUDA_CHECK needs a symbol that torch 2.11 does not export.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) fail_with(status, what);
}

// Of the current device, looked up once.
int device_attribute(cudaDeviceAttr attribute);

inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Whether kernels run there that are compiled for Hopper's own instructions.
inline bool is_hopper() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

// What one kernel can do on the current device.
struct KernelTraits {
  int resident_blocks = 0;        // of a multiprocessor
  bool dependent_launch = false;  // its code has griddepcontrol, so it may start before its predecessor has ended
};

inline constexpr int kMaxDevices = 64;

// A kernel, and what was looked up of it: one static object each, so that it is found without a search.
struct KernelCache {
  int known[kMaxDevices];  // zero: not yet
};

KernelTraits kernel_traits(const void* kernel, KernelCache& cache, int threads, int shared_bytes);

// Starts a kernel with one parameter, after the traits were looked up, and before its predecessor has ended if it can.
void start_kernel(const void* kernel, const KernelTraits& traits, void* parameter, dim3 grid, int threads,
                  int shared_bytes, int cluster, void* stream);

}  // namespace inlay::cuda
