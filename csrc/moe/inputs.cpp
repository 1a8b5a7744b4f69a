#include "moe/inputs.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>

namespace inlay::moe {
namespace {

const void* data_of(const TensorInfo& tensor) {
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &data));
  return data;
}

ExpertMatrices matrices(const TensorInfo& tensor, std::initializer_list<int64_t> sizes, const char* names,
                        const TensorInfo& x) {
  check_shape(tensor, sizes, names);
  check_dense_rows(tensor);
  check_same_device(tensor, x);
  ExpertMatrices result;
  result.data = data_of(tensor);
  result.dtype = tensor.dtype;
  result.expert_stride = tensor.strides[0];
  result.row_stride = tensor.dim == 3 ? tensor.strides[1] : tensor.strides[0];
  return result;
}

}  // namespace

void check_dtype(const TensorInfo& tensor, DType first, DType second) {
  INLAY_CHECK(tensor.dtype == first || tensor.dtype == second, tensor.op, ": ", tensor.name, " must be ",
              name_of(first), first == second ? "" : " or ", first == second ? "" : name_of(second), ", got ",
              name_of(tensor.dtype));
}

IndexTensor flat_indices(const char* op, const char* name, const Tensor& tensor, int64_t count,
                         const TensorInfo& reference) {
  const ScalarType dtype = tensor.scalar_type();
  INLAY_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": ", name,
              " must be int32 or int64, got scalar type ", static_cast<int>(dtype));
  INLAY_CHECK(tensor.numel() == count, op, ": ", name, " must have ", count, " elements, got ", tensor.numel());
  INLAY_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  INLAY_CHECK(device_type == reference.device_type && device_index == reference.device_index, op, ": ", name,
              " must be on ", reference.name, "'s device");
  return {tensor.const_data_ptr(), count, dtype == ScalarType::Long};
}

VectorTensor flat_values(const TensorInfo& tensor, int64_t count, DType first, DType second,
                         const TensorInfo& reference) {
  check_dtype(tensor, first, second);
  check_same_device(tensor, reference);
  const int64_t elements = tensor.rows() * tensor.width();
  INLAY_CHECK(elements == count, tensor.op, ": ", tensor.name, " must have ", count, " elements, got ", elements);
  int64_t stride = 1;
  for (int64_t i = tensor.dim - 1; i >= 0; stride *= tensor.sizes[i--]) {
    INLAY_CHECK(count == 0 || tensor.sizes[i] == 1 || tensor.strides[i] == stride, tensor.op, ": ", tensor.name,
                " must be contiguous");
  }
  return {data_of(tensor), tensor.dtype};
}

Tensor empty_if(bool wanted, std::initializer_list<int64_t> sizes, DType dtype, const TensorInfo& reference) {
  const int64_t none = 0;
  return wanted ? empty(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype, reference)
                : empty(&none, 1, dtype, reference);
}

Scratch make_scratch(int64_t bytes, const TensorInfo& reference) {
  Tensor tensor = empty_if(true, {(bytes + 3) / 4}, DType::f32, reference);
  return {tensor, output_tensor(tensor, DType::f32).data};
}

Tensor empty_integers(std::initializer_list<int64_t> sizes, ScalarType dtype, const TensorInfo& reference) {
  const int64_t dim = static_cast<int64_t>(sizes.size());
  int64_t strides[4] = {1, 1, 1, 1};
  for (int64_t i = dim - 2; i >= 0; --i) strides[i] = strides[i + 1] * std::max<int64_t>(1, sizes.begin()[i + 1]);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes.begin(), strides, static_cast<int32_t>(dtype),
                                                  reference.device_type, reference.device_index, &handle));
  return Tensor(handle);
}

ExpertInputs checked_inputs(const TensorInfo& x, const ExpertArguments& a) {
  const char* op = a.op;
  const TensorInfo gate_up(op, "gate_up_proj", a.gate_up_proj), down(op, "down_proj", a.down_proj);
  INLAY_CHECK(x.dim == 2, op, ": x must have 2 dimensions (tokens, hidden), got ", x.dim);
  INLAY_CHECK(gate_up.dim == 3, op, ": gate_up_proj must have 3 dimensions, got ", gate_up.dim);
  INLAY_CHECK(down.dim == 3, op, ": down_proj must have 3 dimensions, got ", down.dim);
  check_dense_rows(x);
  check_dtype(gate_up, x.dtype, x.dtype);
  check_dtype(down, x.dtype, x.dtype);
  const DType wide = wide_dtype(x.dtype);

  ExpertInputs in;
  in.tokens = x.sizes[0];
  in.slots = a.slots;
  in.experts = gate_up.sizes[0];
  in.hidden = x.sizes[1];
  in.intermediate = down.sizes[a.transposed ? 1 : 2];
  in.transposed = a.transposed;
  in.gating.activation = enum_from(op, "activation", a.activation, Activation::gpt_oss);
  in.gating.gated = a.gated;
  in.gating.interleaved = a.interleaved;
  in.gating.limit = a.limit;
  INLAY_CHECK(in.hidden >= 1 && in.intermediate >= 1, op, ": x and down_proj must not be empty in hidden or ",
              "intermediate size, got ", in.hidden, " and ", in.intermediate);
  INLAY_CHECK(in.slots >= 0, op, ": slots must not be negative, got ", in.slots);
  INLAY_CHECK(in.most_rows() <= std::numeric_limits<int32_t>::max(), op, ": indices must have at most ",
              static_cast<int64_t>(std::numeric_limits<int32_t>::max()), " elements, got ", in.most_rows());
  INLAY_CHECK(in.gating.limit > 0, op, ": limit must be positive");
  INLAY_CHECK(in.gating.gated || in.gating.activation != Activation::gpt_oss, op,
              ": gated must be true for this activation");
  const int64_t width = in.pre_activations();
  in.x = row_tensor(x);
  if (a.transposed) {
    in.gate_up_proj = matrices(gate_up, {in.experts, in.hidden, width}, "E, H, first projection", x);
    in.down_proj = matrices(down, {in.experts, in.intermediate, in.hidden}, "E, I, H", x);
  } else {
    in.gate_up_proj = matrices(gate_up, {in.experts, width, in.hidden}, "E, first projection, H", x);
    in.down_proj = matrices(down, {in.experts, in.hidden, in.intermediate}, "E, H, I", x);
  }
  if (a.gate_up_bias) {
    const TensorInfo bias(op, "gate_up_bias", *a.gate_up_bias);
    check_dtype(bias, x.dtype, wide);
    in.gate_up_bias = matrices(bias, {in.experts, width}, "E, first projection", x);
  }
  if (a.down_bias) {
    const TensorInfo bias(op, "down_bias", *a.down_bias);
    check_dtype(bias, x.dtype, wide);
    in.down_bias = matrices(bias, {in.experts, in.hidden}, "E, H", x);
  }
  if (a.weights) in.weights = flat_values({op, "weights", *a.weights}, in.most_rows(), x.dtype, wide, x);
  if (a.shared) {
    const TensorInfo shared(op, "shared", *a.shared);
    check_shape(shared, {in.tokens, in.hidden}, "T, H");
    check_same_device(shared, x);
    check_dtype(shared, x.dtype, x.dtype);
    in.shared = row_tensor(shared);
  }
  if (a.shared_gate) {
    INLAY_CHECK(a.shared.has_value(), op, ": shared must be given with shared_gate, got None");
    in.shared_gate = flat_values({op, "shared_gate", *a.shared_gate}, in.tokens, x.dtype, wide, x);
  }
  return in;
}

}  // namespace inlay::moe
