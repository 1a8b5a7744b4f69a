#include "common/tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>

namespace inlay {
namespace {

constexpr int64_t kMaxDim = 16;

struct DTypeRow {
  DType dtype;
  ScalarType scalar_type;
};
constexpr DTypeRow kDTypes[] = {
    {DType::f32, ScalarType::Float},
    {DType::bf16, ScalarType::BFloat16},
    {DType::f16, ScalarType::Half},
    {DType::f64, ScalarType::Double},
};

std::string list(const int64_t* values, int64_t count) {
  std::string text = "[";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

}  // namespace

TensorInfo::TensorInfo(const char* op, const char* name, const Tensor& tensor)
    : op(op), name(name), handle(tensor.get()) {
  int64_t* writable_sizes = nullptr;
  int64_t* writable_strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &writable_sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &writable_strides));
  sizes = writable_sizes;
  strides = writable_strides;
  int32_t scalar_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &scalar_type));
  dtype = dtype_from(op, name, static_cast<ScalarType>(scalar_type));
  INLAY_CHECK(dim >= 1 && dim <= kMaxDim, op, ": ", name, " must have 1 to ", kMaxDim, " dimensions, got ", dim);
}

int64_t TensorInfo::rows() const {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) rows *= sizes[i];
  return rows;
}

std::string TensorInfo::shape() const { return list(sizes, dim); }

DType dtype_from(const char* op, const char* name, ScalarType scalar_type) {
  for (const DTypeRow& row : kDTypes) {
    if (row.scalar_type == scalar_type) return row.dtype;
  }
  fail(op, ": ", name, " must be float32, bfloat16, float16 or float64, got scalar type ",
       static_cast<int>(scalar_type));
}

ScalarType scalar_type_of(DType dtype) { return kDTypes[static_cast<int>(dtype)].scalar_type; }

DType promote(DType a, DType b) {
  if (a == b) return a;
  return a == DType::f64 || b == DType::f64 ? DType::f64 : DType::f32;
}

void check_dense_rows(const TensorInfo& tensor) {
  INLAY_CHECK(tensor.width() <= 1 || tensor.strides[tensor.dim - 1] == 1 || tensor.rows() == 0, tensor.op, ": ",
              tensor.name, " must have stride 1 in its last dimension, got strides ", list(tensor.strides, tensor.dim));
}

void check_same_shape(const TensorInfo& tensor, const TensorInfo& reference) {
  bool same = tensor.dim == reference.dim;
  for (int64_t i = 0; same && i < tensor.dim; ++i) same = tensor.sizes[i] == reference.sizes[i];
  INLAY_CHECK(same, tensor.op, ": ", tensor.name, " must have ", reference.name, "'s shape ", reference.shape(),
              ", got ", tensor.shape());
}

void check_same_device(const TensorInfo& tensor, const TensorInfo& reference) {
  INLAY_CHECK(tensor.device_type == reference.device_type && tensor.device_index == reference.device_index, tensor.op,
              ": ", tensor.name, " must be on ", reference.name, "'s device");
}

RowTensor row_tensor(const TensorInfo& tensor) {
  check_dense_rows(tensor);
  // Merge leading dimensions from the innermost outwards; sizes of 1 have no say.
  std::array<int64_t, kMaxDim> size{};
  std::array<int64_t, kMaxDim> stride{};
  int levels = 0;
  for (int64_t i = tensor.dim - 2; i >= 0; --i) {
    if (tensor.sizes[i] == 1) continue;
    if (levels > 0 && tensor.strides[i] == stride[levels - 1] * size[levels - 1]) {
      size[levels - 1] *= tensor.sizes[i];
    } else {
      size[levels] = tensor.sizes[i];
      stride[levels] = tensor.strides[i];
      ++levels;
    }
  }
  INLAY_CHECK(levels <= 3 || tensor.rows() == 0, tensor.op, ": ", tensor.name,
              " must have leading dimensions that merge into at most three, got shape ", tensor.shape(),
              " with strides ", list(tensor.strides, tensor.dim), "; call .contiguous() first");
  RowTensor rows;
  rows.dtype = tensor.dtype;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &rows.data));
  RowLayout& layout = rows.layout;
  if (levels == 1) {
    layout.outer_stride = stride[0];
  } else if (levels == 2) {
    layout.inner_size = size[0];
    layout.inner_stride = stride[0];
    layout.outer_stride = stride[1];
  } else if (levels >= 3) {
    layout.inner_size = size[0];
    layout.inner_stride = stride[0];
    layout.middle_size = size[1];
    layout.middle_stride = stride[1];
    layout.outer_stride = stride[2];
  }
  return rows;
}

VectorTensor vector_tensor(const TensorInfo& tensor, const TensorInfo& reference) {
  INLAY_CHECK(tensor.dim == 1 && tensor.sizes[0] == reference.width(), tensor.op, ": ", tensor.name,
              " must have shape [", reference.width(), "] (", reference.name, "'s width), got ", tensor.shape());
  check_dense_rows(tensor);
  check_same_device(tensor, reference);
  INLAY_CHECK((tensor.dtype == DType::f64) == (reference.dtype == DType::f64), tensor.op, ": ", tensor.name,
              " must be float64 exactly when ", reference.name, " is, got ", name_of(tensor.dtype), " with ",
              name_of(reference.dtype));
  VectorTensor vector;
  vector.dtype = tensor.dtype;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &vector.data));
  return vector;
}

IndexTensor index_tensor(const char* op, const char* name, const Tensor& tensor, const TensorInfo& reference) {
  const ScalarType scalar_type = tensor.scalar_type();
  INLAY_CHECK(scalar_type == ScalarType::Int || scalar_type == ScalarType::Long, op, ": ", name,
              " must be int32 or int64, got scalar type ", static_cast<int>(scalar_type));
  INLAY_CHECK(tensor.dim() == 1, op, ": ", name, " must have 1 dimension, got ", tensor.dim());
  const int64_t size = tensor.size(0);
  INLAY_CHECK(size <= 1 || tensor.stride(0) == 1, op, ": ", name, " must have stride 1, got ", tensor.stride(0));
  int32_t device_type = 0;
  int32_t device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  INLAY_CHECK(device_type == reference.device_type && device_index == reference.device_index, op, ": ", name,
              " must be on ", reference.name, "'s device");
  return {tensor.const_data_ptr(), size, scalar_type == ScalarType::Long};
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, DType dtype,
                     const TensorInfo& reference) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, static_cast<int32_t>(scalar_type_of(dtype)),
                                                  reference.device_type, reference.device_index, &handle));
  return Tensor(handle);
}

Tensor empty(const int64_t* sizes, int64_t dim, DType dtype, const TensorInfo& reference) {
  std::array<int64_t, kMaxDim> strides{};
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides.data(), dim, dtype, reference);
}

Tensor empty_like(const TensorInfo& reference, DType dtype) {
  return empty(reference.sizes, reference.dim, dtype, reference);
}

OutputTensor output_tensor(const Tensor& tensor, DType dtype) {
  OutputTensor output;
  output.dtype = dtype;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor.get(), &output.data));
  return output;
}

}  // namespace inlay
