// Tensors seen as a list of rows: what a kernel over the last dimension needs to know, and no more.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define INLAY_HOST_DEVICE __host__ __device__
#else
// Inlined everywhere: CPU kernels are compiled once per instruction set, and the linker must not merge their copies.
#define INLAY_HOST_DEVICE [[gnu::always_inline]]
#endif

namespace inlay {

// Where each row of a tensor [..., N] starts, in elements. Leading dimensions are merged where their strides allow;
// up to three remain: row = (outer * middle_size + middle) * inner_size + inner.
struct RowLayout {
  int64_t inner_size = 1;
  int64_t middle_size = 1;
  int64_t inner_stride = 0;
  int64_t middle_stride = 0;
  int64_t outer_stride = 0;  // alone when the rows are evenly spaced: both sizes are then 1

  INLAY_HOST_DEVICE bool evenly_spaced() const { return inner_size == 1 && middle_size == 1; }

  INLAY_HOST_DEVICE int64_t offset(int64_t row) const {
    if (evenly_spaced()) return row * outer_stride;
    if (row <= UINT32_MAX && inner_size <= UINT32_MAX && middle_size <= UINT32_MAX) {  // 32-bit division is cheaper
      const uint32_t outer_middle = static_cast<uint32_t>(row) / static_cast<uint32_t>(inner_size);
      const uint32_t inner = static_cast<uint32_t>(row) - outer_middle * static_cast<uint32_t>(inner_size);
      const uint32_t outer = outer_middle / static_cast<uint32_t>(middle_size);
      const uint32_t middle = outer_middle - outer * static_cast<uint32_t>(middle_size);
      return outer * outer_stride + middle * middle_stride + inner * inner_stride;
    }
    const int64_t outer_middle = row / inner_size;
    const int64_t outer = outer_middle / middle_size;
    return outer * outer_stride + (outer_middle - outer * middle_size) * middle_stride +
           (row - outer_middle * inner_size) * inner_stride;
  }
};

// An input [rows, N] whose rows may lie anywhere; null data: absent.
struct RowTensor {
  const void* data = nullptr;
  DType dtype = DType::f32;
  RowLayout layout;
};

// A contiguous output [rows, N] or [N]; null data: not wanted.
struct OutputTensor {
  void* data = nullptr;
  DType dtype = DType::f32;
};

// A dense input [N]; null data: absent.
struct VectorTensor {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

}  // namespace inlay
