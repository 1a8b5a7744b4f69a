#include "conv/inputs.h"

namespace inlay::conv {

const void* data_of(const TensorInfo& tensor) {
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &data));
  return data;
}

void check_dim(const TensorInfo& tensor, int64_t dim, const char* shape) {
  INLAY_CHECK(tensor.dim == dim, tensor.op, ": ", tensor.name, " must have shape ", shape, ", got ", tensor.shape());
}

void check_dtype(const TensorInfo& tensor, DType dtype) {
  INLAY_CHECK(tensor.dtype == dtype, tensor.op, ": ", tensor.name, " must be ", name_of(dtype), ", got ",
              name_of(tensor.dtype));
}

VectorTensor weight_tensor(const TensorInfo& weight, const TensorInfo& x, int64_t channels, int64_t& width) {
  const bool flat = weight.dim == 2 && weight.sizes[0] == channels;
  const bool grouped = weight.dim == 3 && weight.sizes[0] == channels && weight.sizes[1] == 1;
  INLAY_CHECK(flat || grouped, weight.op, ": ", weight.name, " must have shape [", channels, ", W] or [", channels,
              ", 1, W] (", x.name, "'s channels), got ", weight.shape());
  width = weight.width();
  INLAY_CHECK(width >= kMinWidth && width <= kMaxWidth, weight.op, ": ", weight.name, " must be ", kMinWidth, " to ",
              kMaxWidth, " wide, got ", width);
  check_same_device(weight, x);
  INLAY_CHECK((weight.dtype == DType::f64) == (x.dtype == DType::f64), weight.op, ": ", weight.name,
              " must be float64 exactly when ", x.name, " is, got ", name_of(weight.dtype), " with ", name_of(x.dtype));
  check_dense_rows(weight);
  INLAY_CHECK(channels <= 1 || weight.strides[0] == width, weight.op, ": ", weight.name, " must be contiguous");
  return {data_of(weight), weight.dtype};
}

Activation activation_from(const char* op, int64_t activation) {
  return enum_from(op, "activation", activation, Activation::silu);
}

bool rounds_preactivation(DType x, DType weight) {
  const DType dtype = promote(x, weight);
  return dtype == DType::bf16 || dtype == DType::f16;
}

StepParams checked_step(const TensorInfo& x, const TensorInfo& state_info, const TensorInfo& weight,
                        int64_t activation) {
  StepParams params;
  params.batch = x.sizes[0];
  params.time = x.dim == 3 ? x.sizes[1] : 1;
  params.channels = x.width();
  params.dtype = x.dtype;
  params.x = {data_of(x), x.strides[0], x.dim == 3 ? x.strides[1] : 0, x.strides[x.dim - 1]};
  params.weight = weight_tensor(weight, x, params.channels, params.width);
  params.activation = activation_from(x.op, activation);
  params.rounds_preactivation = rounds_preactivation(x.dtype, params.weight.dtype);

  check_dim(state_info, 3, "[B, C, L]");
  INLAY_CHECK(state_info.sizes[1] == params.channels && state_info.sizes[2] >= params.width - 1, x.op, ": ",
              state_info.name, " must have shape [B, ", params.channels, ", L] with L at least ", params.width - 1,
              ", got ", state_info.shape());
  check_dtype(state_info, x.dtype);
  check_same_device(state_info, x);
  params.slots = state_info.sizes[0];
  params.columns = state_info.sizes[2];
  void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(state_info.handle, &data));
  params.state = state(state_info, data);
  return params;
}

void check_slots(const StepParams& params, const char* op, const char* state, const TensorInfo& x) {
  INLAY_CHECK(params.slots == params.batch, op, ": ", state, " must have ", x.name, "'s batch size ", params.batch,
              ", got ", params.slots);
}

}  // namespace inlay::conv
