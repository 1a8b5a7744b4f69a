// The formulas of the gates, for every kernel that computes them.
#pragma once

#include "common/cuda/sigmoid.cuh"
#include "common/cuda/vector.cuh"
#include "gdn/params.h"

namespace inlay::gdn::cuda {

using namespace inlay::cuda;

__device__ inline float value(const RowTensor& tensor, int64_t row, int64_t head) {
  float x[1];
  load_as_float(tensor.data, tensor.dtype, tensor.layout.offset(row) + head, x);
  return x[0];
}

__device__ inline float value(const VectorTensor& tensor, int64_t head) {
  float x[1];
  load_as_float(tensor.data, tensor.dtype, head, x);
  return x[0];
}

// A number on its way from memory: several are asked for before the first is waited for.
struct Pending {
  uint32_t bits;
  DType dtype;

  __device__ Pending(const void* data, DType dtype, int64_t index) : dtype(dtype) {
    if (dtype == DType::f32) {
      bits = static_cast<const uint32_t*>(data)[index];
    } else {
      bits = static_cast<const uint16_t*>(data)[index];
    }
  }

  __device__ float value() const {
    float x[1];
    load_as_float(&bits, dtype, 0, x);
    return x[0];
  }
};

// As torch's, which is linear above 20.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

}  // namespace inlay::gdn::cuda
