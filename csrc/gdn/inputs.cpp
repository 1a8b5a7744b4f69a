#include "gdn/inputs.h"

namespace inlay::gdn {
namespace {

DType second_state_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::bf16; }

}  // namespace

void check_dtype(const TensorInfo& tensor, DType first, DType second) {
  INLAY_CHECK(tensor.dtype == first || tensor.dtype == second, tensor.op, ": ", tensor.name, " must be ",
              name_of(first), first == second ? "" : " or ", first == second ? "" : name_of(second), ", got ",
              name_of(tensor.dtype));
}

void check_state_dtype(const char* op, const char* name, DType state, DType dtype) {
  INLAY_CHECK(state == wide_dtype(dtype) || state == second_state_dtype(dtype), op, ": ", name, " must be ",
              dtype == DType::f64 ? "float64" : "float32 or bfloat16", ", got ", name_of(state));
}

StateTensor state_tensor(const TensorInfo& tensor, const Inputs& inputs, const TensorInfo& q) {
  check_shape(tensor, {inputs.sequences.count, inputs.value_heads, inputs.key_dim, inputs.value_dim}, "N, Hv, K, V");
  check_state_dtype(tensor.op, tensor.name, tensor.dtype, q.dtype);
  check_same_device(tensor, q);
  check_dense_rows(tensor);
  INLAY_CHECK(tensor.strides[2] == inputs.value_dim, tensor.op, ": ", tensor.name,
              " must have dense matrices [K, V], got a stride of ", tensor.strides[2], " for ", inputs.value_dim,
              " columns");
  StateTensor state;
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &data));
  state.data = const_cast<void*>(data);
  state.dtype = tensor.dtype;
  state.sequence_stride = tensor.strides[0];
  state.head_stride = tensor.strides[1];
  return state;
}

StateTensor updated_state(const TensorInfo& tensor, const Inputs& inputs, const TensorInfo& q) {
  const StateTensor state = state_tensor(tensor, inputs, q);
  const int64_t size = inputs.key_dim * inputs.value_dim;
  INLAY_CHECK((state.head_stride == size || inputs.value_heads == 1) &&
                  (state.sequence_stride >= inputs.value_heads * size || inputs.sequences.count <= 1),
              tensor.op, ": ", tensor.name, " must not overlap itself: a dense [Hv, K, V] for each of the batch");
  return state;
}

OutputTensor states_of_tokens(const OptionalTensor& states_out, const Inputs& inputs, const TensorInfo& state,
                              const TensorInfo& q) {
  if (!states_out) return {};
  const TensorInfo every(q.op, "states_out", *states_out);
  check_shape(every, {inputs.batch, inputs.sequences.tokens, inputs.value_heads, inputs.key_dim, inputs.value_dim},
              "B, T, Hv, K, V");
  check_dtype(every, state.dtype, state.dtype);
  check_same_device(every, q);
  INLAY_CHECK(states_out->is_contiguous(), q.op, ": states_out must be contiguous");
  return output_tensor(*states_out, every.dtype);
}

void check_head_dim(const TensorInfo& tensor, const char* dimension, int64_t size) {
  INLAY_CHECK(size >= 1 && size <= kMaxHeadDim && size % kHeadDimMultiple == 0, tensor.op, ": ", tensor.name,
              " must have a multiple of ", kHeadDimMultiple, " up to ", kMaxHeadDim, " in its ", dimension,
              " dimension, got ", size);
}

Inputs checked_inputs(const TensorInfo& q, const InputTensors& tensors, const OptionalTensor& initial_state,
                      const OptionalTensor& cu_seqlens, double scale, bool l2norm_qk) {
  const char* op = q.op;
  const TensorInfo k(op, "k", tensors.k), v(op, "v", tensors.v), g(op, "g", tensors.g);
  const TensorInfo beta(op, "beta", tensors.beta);
  INLAY_CHECK(q.dim == 4, op, ": q must have shape [B, T, Hk, K], got ", q.shape());
  check_same_shape(k, q);
  INLAY_CHECK(v.dim == 4 && v.sizes[0] == q.sizes[0] && v.sizes[1] == q.sizes[1], op,
              ": v must have shape [B, T, Hv, V] with q's B and T ", q.shape(), ", got ", v.shape());
  Inputs inputs;
  inputs.batch = q.sizes[0];
  inputs.key_heads = q.sizes[2];
  inputs.value_heads = v.sizes[2];
  inputs.key_dim = q.sizes[3];
  inputs.value_dim = v.sizes[3];
  INLAY_CHECK(inputs.key_heads >= 1 && inputs.value_heads >= 1 && inputs.value_heads % inputs.key_heads == 0, op,
              ": v must have a multiple of q's heads ", inputs.key_heads, ", got ", inputs.value_heads);
  for (const TensorInfo* tensor : {&q, &v}) check_head_dim(*tensor, "last", tensor->width());
  const DType wide = wide_dtype(q.dtype);
  for (const TensorInfo* tensor : {&g, &beta}) {
    check_shape(*tensor, {q.sizes[0], q.sizes[1], v.sizes[2]}, "B, T, Hv");
  }
  check_dtype(k, q.dtype, q.dtype);
  check_dtype(v, q.dtype, q.dtype);
  check_dtype(g, wide, wide);
  check_dtype(beta, q.dtype, wide);
  for (const TensorInfo* tensor : {&k, &v, &g, &beta}) check_same_device(*tensor, q);
  inputs.q = token_tensor(q);
  inputs.k = token_tensor(k);
  inputs.v = token_tensor(v);
  inputs.g = token_tensor(g);
  inputs.beta = token_tensor(beta);
  inputs.sequences = sequences_of(op, cu_seqlens, q);
  if (initial_state) inputs.initial_state = state_tensor({op, "initial_state", *initial_state}, inputs, q);
  inputs.scale = scale;
  inputs.l2norm_qk = l2norm_qk;
  return inputs;
}

std::pair<Tensor, StateTensor> empty_states(bool wanted, DType dtype, const Inputs& inputs, const TensorInfo& q) {
  const int64_t size = inputs.key_dim * inputs.value_dim;
  const int64_t sizes[] = {inputs.sequences.count, inputs.value_heads, inputs.key_dim, inputs.value_dim};
  const int64_t none = 0;
  Tensor tensor = wanted ? empty(sizes, 4, dtype, q) : empty(&none, 1, dtype, q);
  if (!wanted) return {tensor, {}};
  return {tensor, {output_tensor(tensor, dtype).data, dtype, inputs.value_heads * size, size}};
}

}  // namespace inlay::gdn
