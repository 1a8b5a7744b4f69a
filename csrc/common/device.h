// Each binding source is compiled once per library: into libinlay for the CPU, and into libinlay_cuda with
// INLAY_CUDA defined. This header is all that differs between the two.
#pragma once

#include "common/tensor.h"

#ifdef INLAY_CUDA
#include <torch/csrc/stable/accelerator.h>
#define INLAY_DISPATCH_KEY CUDA
#else
#define INLAY_DISPATCH_KEY CPU
#endif

namespace inlay {

using Stream = void*;  // a cudaStream_t; null on the CPU

// Makes the tensor's device current for its lifetime, and knows torch's current stream there.
class LaunchScope {
 public:
#ifdef INLAY_CUDA
  explicit LaunchScope(const TensorInfo& tensor) : guard_(tensor.device_index) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.device_index, &stream_));
  }
#else
  explicit LaunchScope(const TensorInfo&) {}
#endif
  Stream stream() const { return stream_; }

 private:
  Stream stream_ = nullptr;
#ifdef INLAY_CUDA
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace inlay
