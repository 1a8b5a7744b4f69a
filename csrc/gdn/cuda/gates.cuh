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

// As torch's, which is linear above 20.
__device__ inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

}  // namespace inlay::gdn::cuda
