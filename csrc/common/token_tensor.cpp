#include "common/token_tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>

namespace inlay {

void check_shape(const TensorInfo& tensor, std::initializer_list<int64_t> sizes, const char* names) {
  if (tensor.dim == static_cast<int64_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), tensor.sizes)) return;
  std::string expected;
  for (const int64_t size : sizes) expected += (expected.empty() ? "[" : ", ") + std::to_string(size);
  fail(tensor.op, ": ", tensor.name, " must have shape ", expected, "] (", names, "), got ", tensor.shape());
}

TokenTensor token_tensor(const TensorInfo& tensor) {
  if (tensor.dim == 4) check_dense_rows(tensor);
  TokenTensor tokens;
  tokens.dtype = tensor.dtype;
  tokens.batch_stride = tensor.strides[0];
  tokens.token_stride = tensor.strides[1];
  tokens.head_stride = tensor.strides[2];
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &tokens.data));
  return tokens;
}

Sequences sequences_of(const char* op, const OptionalTensor& cu_seqlens, const TensorInfo& reference,
                       const char* name) {
  Sequences sequences;
  sequences.count = reference.sizes[0];
  sequences.tokens = reference.sizes[1];
  if (!cu_seqlens) return sequences;
  const Tensor& tensor = *cu_seqlens;
  const ScalarType dtype = tensor.scalar_type();
  INLAY_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": ", name,
              " must be int32 or int64, got scalar type ", static_cast<int>(dtype));
  INLAY_CHECK(tensor.dim() == 1 && tensor.size(0) >= 1, op, ": ", name, " must have shape [N + 1], got ", tensor.dim(),
              " dimensions and ", tensor.numel(), " elements");
  INLAY_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  INLAY_CHECK(sequences.count == 1, op, ": ", reference.name, " must have a batch of 1 with ", name, ", got ",
              sequences.count);
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  INLAY_CHECK(device_type == reference.device_type && device_index == reference.device_index, op, ": ", name,
              " must be on ", reference.name, "'s device");
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &sequences.offsets));
  sequences.offsets_are_64_bit = dtype == ScalarType::Long;
  sequences.count = tensor.size(0) - 1;
  return sequences;
}

}  // namespace inlay
