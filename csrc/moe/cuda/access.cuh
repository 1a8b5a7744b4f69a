// How wide the kernels around the products read: 16 bytes where all tensors allow it, else single elements.
#pragma once

#include <type_traits>

#include "common/cuda/vector.cuh"
#include "moe/params.h"

namespace inlay::moe::cuda {

using namespace inlay::cuda;

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

inline bool aligned_rows(const RowTensor& tensor) {
  const int64_t bytes = size_of(tensor.dtype);
  const RowLayout& layout = tensor.layout;
  return aligned(tensor.data) && layout.inner_stride * bytes % 16 == 0 && layout.middle_stride * bytes % 16 == 0 &&
         layout.outer_stride * bytes % 16 == 0;
}

inline bool aligned_rows(const ExpertMatrices& rows) {
  return aligned(rows.data) && rows.expert_stride * size_of(rows.dtype) % 16 == 0;
}

// Calls use(zero of the element type, elements of an access as a type); `aligned` of rows of `width` elements.
template <class Use>
void with_access(DType dtype, int64_t width, bool aligned, Use use) {
  const auto with_type = [&](auto zero) {
    constexpr int kWide = kPerAccess<decltype(zero)>;
    if (aligned && width % kWide == 0) {
      use(zero, std::integral_constant<int, kWide>());
    } else {
      use(zero, std::integral_constant<int, 1>());
    }
  };
  switch (dtype) {
    case DType::bf16:
      return with_type(__nv_bfloat16{});
    case DType::f16:
      return with_type(__half{});
    default:
      return with_type(float{});
  }
}

__device__ inline float load_number(const VectorTensor& values, int64_t index) {
  float value[1];
  load_as_float(values.data, values.dtype, index, value);
  return value[0];
}

__device__ inline void store_number(const OutputTensor& target, int64_t index, float value) {
  const float values[1] = {value};
  store_from_float(target.data, target.dtype, index, values);
}

template <typename T>
__device__ inline const T* row_of(const RowTensor& tensor, int64_t row) {
  return static_cast<const T*>(tensor.data) + tensor.layout.offset(row);
}

// What a lane takes of a row, from `column` on: zeros beyond the row. As many elements whether it may read 16 bytes
// (N is what it takes) or single ones, so that a sum over a row has the same order.
template <int N, typename T>
__device__ inline void load_part(const T* row, int64_t column, int64_t width, float (&values)[kPerAccess<T>]) {
  if constexpr (N == kPerAccess<T>) {
    unpack(load<T, N>(row + column), values);
  } else {
#pragma unroll
    for (int i = 0; i < kPerAccess<T>; ++i) values[i] = column + i < width ? to_float(row[column + i]) : 0.0f;
  }
}

template <int N, typename T>
__device__ inline void store_part(T* row, int64_t column, int64_t width, const float (&values)[kPerAccess<T>]) {
  if constexpr (N == kPerAccess<T>) {
    store(row + column, pack<T>(values));
  } else {
#pragma unroll
    for (int i = 0; i < kPerAccess<T>; ++i) {
      if (column + i < width) row[column + i] = from_float<T>(values[i]);
    }
  }
}

__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

}  // namespace inlay::moe::cuda
