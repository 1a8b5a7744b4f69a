#include "common/cuda/runtime.h"

#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

namespace inlay::cuda {
namespace {

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

// How traits lie in a KernelCache.
int packed(const KernelTraits& traits) { return 1 + (traits.dependent_launch ? 1 : 0) + 2 * traits.resident_blocks; }
KernelTraits unpacked(int known) { return {(known - 1) / 2, (known - 1) % 2 != 0}; }

KernelTraits look_up(const void* kernel, int threads, int shared_bytes) {
  KernelTraits found;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "loading a kernel for this GPU");
  found.dependent_launch = attributes.ptxVersion >= 90;
  if (shared_bytes > 0) {  // more than the 48 KiB a block gets without asking, its static arrays counted in
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
          "raising a kernel's shared memory limit");
  }
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found.resident_blocks, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return found;
}

}  // namespace

void fail(const char* message) { throw std::runtime_error(message); }

void fail_with(cudaError_t status, const char* what) {
  throw std::runtime_error(std::string("inlay: ") + what + " failed: " + cudaGetErrorString(status));
}

int device_attribute(cudaDeviceAttr attribute) {
  constexpr int kAttributes = 256;
  static std::array<std::array<std::atomic<int>, kAttributes>, kMaxDevices> known{};  // one more than the value
  if (attribute >= kAttributes) fail("inlay: no such attribute of a GPU");
  const int device = current_device();
  std::atomic<int>& of_device = known[device][attribute];
  int value = of_device.load(std::memory_order_relaxed) - 1;
  if (value < 0) {
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    of_device.store(value + 1, std::memory_order_relaxed);
  }
  return value;
}

KernelTraits kernel_traits(const void* kernel, KernelCache& cache, int threads, int shared_bytes) {
  int& of_device = cache.known[current_device()];
  int known = __atomic_load_n(&of_device, __ATOMIC_ACQUIRE);
  if (known == 0) {
    known = packed(look_up(kernel, threads, shared_bytes));
    __atomic_store_n(&of_device, known, __ATOMIC_RELEASE);  // racing threads write the same value
  }
  return unpacked(known);
}

void start_kernel(const void* kernel, const KernelTraits& traits, void* parameter, dim3 grid, int threads,
                  int shared_bytes, int cluster, void* stream) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = !traits.dependent_launch ? 0 : cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelExC(&config, kernel, &parameter), "launching a kernel");
}

}  // namespace inlay::cuda
