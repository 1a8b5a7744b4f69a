// Bindings of the conv family: check, allocate, fill parameters, launch.
#include "common/device.h"
#include "conv/inputs.h"

#include <torch/csrc/stable/library.h>

namespace inlay::conv {
namespace {

constexpr int64_t kNone[] = {0};  // the size of a result that is not wanted

// Channels lie side by side, or else the tokens do.
bool has_dense_channels(const TensorInfo& tensor) { return tensor.sizes[2] <= 1 || tensor.strides[2] == 1; }
bool has_dense_tokens(const TensorInfo& tensor) {
  return tensor.sizes[1] <= 1 || tensor.strides[1] == 1 || tensor.sizes[0] * tensor.sizes[1] * tensor.sizes[2] == 0;
}

template <class Data>
Signal<Data> signal(const TensorInfo& tensor, Data data) {
  return {data, tensor.strides[0], tensor.strides[1], tensor.strides[2]};
}

StateInput state_like(const TensorInfo& tensor, const TensorInfo& x, const Convolution& p) {
  INLAY_CHECK(tensor.dim == 3 && tensor.sizes[0] == p.sequences.count && tensor.sizes[1] == p.channels &&
                  tensor.sizes[2] == p.width - 1,
              tensor.op, ": ", tensor.name, " must have shape [", p.sequences.count, ", ", p.channels, ", ",
              p.width - 1, "], got ", tensor.shape());
  check_dtype(tensor, x.dtype);
  check_same_device(tensor, x);
  return state(tensor, data_of(tensor));
}

void fill_convolution(const TensorInfo& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens, int64_t activation,
                      Convolution& p) {
  const char* op = x.op;
  check_dim(x, 3, "[B, T, C]");
  INLAY_CHECK(has_dense_channels(x) || has_dense_tokens(x), op,
              ": x must have stride 1 in its last dimension or in the one before it, got strides [", x.strides[0], ", ",
              x.strides[1], ", ", x.strides[2], "]");
  p.batch = x.sizes[0];
  p.time = x.sizes[1];
  p.channels = x.sizes[2];
  p.dtype = x.dtype;
  p.time_contiguous = !has_dense_channels(x);
  p.x = signal(x, data_of(x));
  p.weight = weight_tensor(TensorInfo(op, "weight", weight), x, p.channels, p.width);
  if (bias) p.bias = vector_tensor(TensorInfo(op, "bias", *bias), x);
  p.activation = activation_from(op, activation);
  p.rounds_preactivation = rounds_preactivation(x.dtype, p.weight.dtype);
  p.sequences.count = p.batch;
  p.sequences.time = p.time;
  if (cu_seqlens) {
    p.sequences.boundaries = index_tensor(op, "cu_seqlens", *cu_seqlens, x);
    p.sequences.count = p.sequences.boundaries.size - 1;
    INLAY_CHECK(p.batch == 1, op, ": x must have a batch of 1 with cu_seqlens, got ", p.batch);
    INLAY_CHECK(p.sequences.count >= 1, op, ": cu_seqlens must have at least 2 elements, got ", p.sequences.count + 1);
  }
  if (initial_state) p.initial_state = state_like(TensorInfo(op, "initial_state", *initial_state), x, p);
}

// A result of x's shape that lies in memory as x does: dense, channels or tokens innermost.
Tensor empty_signal(const Convolution& p, const TensorInfo& x, SignalOutput& output) {
  const auto at_least_one = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t sizes[] = {p.batch, p.time, p.channels};
  const int64_t batch_stride = at_least_one(p.time) * at_least_one(p.channels);
  const int64_t strides[] = {batch_stride, p.time_contiguous ? 1 : at_least_one(p.channels),
                             p.time_contiguous ? at_least_one(p.time) : 1};
  Tensor tensor = empty_strided(sizes, strides, 3, p.dtype, x);
  output = {output_tensor(tensor, p.dtype).data, strides[0], strides[1], strides[2]};
  return tensor;
}

Tensor empty_state(const Convolution& p, const TensorInfo& x, bool wanted, StateOutput& output) {
  if (!wanted) return empty(kNone, 1, p.dtype, x);
  const int64_t columns = p.width - 1;
  const int64_t sizes[] = {p.sequences.count, p.channels, columns};
  Tensor tensor = empty(sizes, 3, p.dtype, x);
  output = {output_tensor(tensor, p.dtype).data, p.channels * columns, columns, 1};
  return tensor;
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x_tensor, const Tensor& weight, const OptionalTensor& bias,
                                         const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                         int64_t activation, bool wants_final_state) {
  const TensorInfo x("causal_conv1d", "x", x_tensor);
  ForwardParams params;
  fill_convolution(x, weight, bias, initial_state, cu_seqlens, activation, params);
  const LaunchScope scope(x);
  Tensor y = empty_signal(params, x, params.y);
  Tensor final_state = empty_state(params, x, wants_final_state, params.final_state);
  if (params.batch > 0 && params.channels > 0) forward(params, scope.stream());
  return {y, final_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_bwd(
    const Tensor& dy_tensor, const OptionalTensor& dfinal_state, const Tensor& x_tensor, const Tensor& weight_tensor,
    const OptionalTensor& bias, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
    int64_t activation, bool needs_dweight, bool needs_dbias, bool needs_dinitial_state) {
  const char* op = "causal_conv1d_bwd";
  const TensorInfo x(op, "x", x_tensor);
  BackwardParams params;
  fill_convolution(x, weight_tensor, bias, initial_state, cu_seqlens, activation, params);
  const TensorInfo dy(op, "dy", dy_tensor);
  check_same_shape(dy, x);
  check_dtype(dy, x.dtype);
  check_same_device(dy, x);
  INLAY_CHECK(params.time_contiguous ? has_dense_tokens(dy) : has_dense_channels(dy), op,
              ": dy must have stride 1 in the dimension where x has it");
  params.dy = signal(dy, data_of(dy));
  if (dfinal_state) params.dfinal_state = state_like(TensorInfo(op, "dfinal_state", *dfinal_state), x, params);
  INLAY_CHECK(!needs_dbias || bias, op, ": bias must be given when its gradient is wanted, got None");
  INLAY_CHECK(!needs_dinitial_state || initial_state, op,
              ": initial_state must be given when its gradient is wanted, got None");

  const LaunchScope scope(x);
  Tensor dx = empty_signal(params, x, params.dx);
  Tensor dinitial_state = empty_state(params, x, needs_dinitial_state, params.dinitial_state);
  const TensorInfo weight(op, "weight", weight_tensor);
  Tensor dweight = needs_dweight ? empty_like(weight, weight.dtype) : empty(kNone, 1, weight.dtype, x);
  const DType bias_dtype = bias ? params.bias.dtype : x.dtype;
  Tensor dbias = empty(needs_dbias ? &params.channels : kNone, 1, bias_dtype, x);
  if (needs_dweight) params.dweight = output_tensor(dweight, weight.dtype);
  if (needs_dbias) params.dbias = output_tensor(dbias, bias_dtype);

  // Without tokens the sums over them are zero: the kernels handle that.
  std::optional<Tensor> partials;
  params.partial_rows = partial_rows(params);
  if (params.sums() > 0 && params.channels > 0) {
    const DType accumulator = wide_dtype(x.dtype);
    const int64_t sizes[] = {params.partial_rows, params.sums(), params.channels};
    partials = empty(sizes, 3, accumulator, x);
    params.partials = output_tensor(*partials, accumulator).data;
  }
  if (params.channels > 0) backward(params, scope.stream());
  return {dx, dweight, dbias, dinitial_state};
}

Tensor causal_conv1d_step(const Tensor& x_tensor, const Tensor& state_tensor, const Tensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& state_indices, int64_t activation) {
  const char* op = "causal_conv1d_step";
  const TensorInfo x(op, "x", x_tensor);
  INLAY_CHECK(x.dim == 2 || x.dim == 3, op, ": x must have shape [B, T, C] or [B, C], got ", x.shape());
  StepParams params = checked_step(x, {op, "state", state_tensor}, {op, "weight", weight}, activation);
  if (bias) params.bias = vector_tensor(TensorInfo(op, "bias", *bias), x);
  if (state_indices) {
    params.slot_of_row = index_tensor(op, "state_indices", *state_indices, x);
    INLAY_CHECK(params.slot_of_row.size == params.batch, op, ": state_indices must have shape [", params.batch,
                "] (x's batch size), got [", params.slot_of_row.size, "]");
  } else {
    check_slots(params, op, "state", x);
  }

  const LaunchScope scope(x);
  Tensor y = empty_like(x, x.dtype);
  params.y = {output_tensor(y, x.dtype).data, params.time * params.channels, params.channels, 1};
  if (params.batch > 0 && params.time > 0 && params.channels > 0) step(params, scope.stream());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&causal_conv1d_bwd));
  m.impl("causal_conv1d_step", TORCH_BOX(&causal_conv1d_step));
}

}  // namespace inlay::conv
