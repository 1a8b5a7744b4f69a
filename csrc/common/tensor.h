// What bindings do with tensors: read their metadata once, check it, see them as rows, allocate results.
// Only binding files include this: it is the border between torch and the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/indices.h"
#include "common/rows.h"

namespace inlay {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Metadata of one tensor argument. Each read crosses the C ABI, so it happens once per tensor and call.
struct TensorInfo {
  TensorInfo(const char* op, const char* name, const Tensor& tensor);

  int64_t width() const { return sizes[dim - 1]; }
  int64_t rows() const;  // product of the leading sizes
  std::string shape() const;

  const char* op;
  const char* name;
  AtenTensorHandle handle;
  int32_t device_type;
  int32_t device_index;
  DType dtype;
  int64_t dim;
  const int64_t* sizes;
  const int64_t* strides;
};

DType dtype_from(const char* op, const char* name, ScalarType scalar_type);
ScalarType scalar_type_of(DType dtype);
// What torch's type promotion gives for two floating dtypes.
DType promote(DType a, DType b);

// `<op>: <argument> must ...` unless the last dimension is dense.
void check_dense_rows(const TensorInfo& tensor);
void check_same_shape(const TensorInfo& tensor, const TensorInfo& reference);
void check_same_device(const TensorInfo& tensor, const TensorInfo& reference);

// The tensor as rows, which must be dense; throws when its leading dimensions have over three distinct strides.
RowTensor row_tensor(const TensorInfo& tensor);
// A dense [width] of any dtype that may accompany `reference` (float64 goes with float64 alone).
VectorTensor vector_tensor(const TensorInfo& tensor, const TensorInfo& reference);

// A dense [N] of int32 or int64 on the device of `reference`.
IndexTensor index_tensor(const char* op, const char* name, const Tensor& tensor, const TensorInfo& reference);

// An uninitialised tensor on the device of `reference`; `empty` and `empty_like` make contiguous ones.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, DType dtype,
                     const TensorInfo& reference);
Tensor empty(const int64_t* sizes, int64_t dim, DType dtype, const TensorInfo& reference);
Tensor empty_like(const TensorInfo& reference, DType dtype);
OutputTensor output_tensor(const Tensor& tensor, DType dtype);

}  // namespace inlay
