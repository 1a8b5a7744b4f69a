// Binding of the whole layer's step.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/device.h"
#include "conv/inputs.h"
#include "gdn/inputs.h"
#include "gdn/layer.h"

namespace inlay::gdn {
namespace {

struct LayerGates {
  const Tensor& a;
  const Tensor& b;
  const Tensor& log_decay;
  const Tensor& dt_bias;
};

void set_gates(LayerStepParams& params, const TensorInfo& x, const LayerGates& tensors) {
  const TensorInfo a(x.op, "a", tensors.a), b(x.op, "b", tensors.b);
  for (const TensorInfo* tensor : {&a, &b}) {
    check_shape(*tensor, {x.sizes[0], x.sizes[1], params.value_heads}, "B, T, Hv");
    check_same_device(*tensor, x);
    check_dense_rows(*tensor);
  }
  INLAY_CHECK((a.dtype == DType::f64) == (x.dtype == DType::f64), x.op,
              ": a must be float64 exactly when mixed_qkv is, got ", name_of(a.dtype), " with ", name_of(x.dtype));
  check_dtype(b, x.dtype, wide_dtype(x.dtype));
  params.a = token_tensor(a);
  params.b = token_tensor(b);
  params.log_decay = vector_tensor({x.op, "A_log", tensors.log_decay}, a);
  params.dt_bias = vector_tensor({x.op, "dt_bias", tensors.dt_bias}, a);
}

Tensor gdn_layer_step(const Tensor& mixed_qkv, const Tensor& z_tensor, const Tensor& a, const Tensor& b,
                      const Tensor& conv_weight, const OptionalTensor& conv_bias, const Tensor& log_decay,
                      const Tensor& dt_bias, const Tensor& norm_weight, const Tensor& conv_state,
                      const Tensor& recurrent_state, const OptionalTensor& states_out, int64_t key_heads, double eps,
                      double beta_scale) {
  const char* op = "gdn_layer_step";
  const TensorInfo x(op, "mixed_qkv", mixed_qkv), z(op, "z", z_tensor), state(op, "state", recurrent_state);
  INLAY_CHECK(x.dim == 3, op, ": mixed_qkv must have shape [B, T, C], got ", x.shape());
  INLAY_CHECK(x.sizes[1] >= 1 && x.sizes[1] <= kMaxStepTokens, op, ": mixed_qkv must have 1 to ", kMaxStepTokens,
              " tokens, got ", x.sizes[1]);
  INLAY_CHECK(z.dim == 4 && z.sizes[0] == x.sizes[0] && z.sizes[1] == x.sizes[1], op,
              ": z must have shape [B, T, Hv, V] with mixed_qkv's B and T ", x.shape(), ", got ", z.shape());
  INLAY_CHECK(state.dim == 4, op, ": state must have shape [B, Hv, K, V], got ", state.shape());
  LayerStepParams params;
  params.key_heads = key_heads;
  params.value_heads = z.sizes[2];
  params.key_dim = state.sizes[2];
  params.value_dim = z.sizes[3];
  INLAY_CHECK(key_heads >= 1 && params.value_heads >= 1 && params.value_heads % key_heads == 0, op,
              ": key_heads must divide z's heads ", params.value_heads, ", got ", key_heads);
  check_head_dim(state, "third", params.key_dim);
  check_head_dim(z, "last", params.value_dim);
  const int64_t channels = 2 * key_heads * params.key_dim + params.value_heads * params.value_dim;
  INLAY_CHECK(x.width() == channels, op, ": mixed_qkv must have 2 Hk K + Hv V = ", channels, " channels, got ",
              x.width());
  check_dtype(z, x.dtype, x.dtype);
  check_same_device(z, x);
  params.z = token_tensor(z);

  params.conv = conv::checked_step(x, {op, "conv_state", conv_state}, {op, "conv_weight", conv_weight},
                                   static_cast<int64_t>(conv::Activation::silu));
  conv::check_slots(params.conv, op, "conv_state", x);
  const conv::StateOutput& columns = params.conv.state;
  INLAY_CHECK((columns.sequence_stride != 0 || x.sizes[0] <= 1) && columns.channel_stride != 0 &&
                  (columns.column_stride != 0 || params.conv.columns <= 1),
              op, ": conv_state must not overlap itself");
  if (conv_bias) params.conv.bias = vector_tensor({op, "conv_bias", *conv_bias}, x);
  set_gates(params, x, {a, b, log_decay, dt_bias});
  params.norm_weight = vector_tensor({op, "norm_weight", norm_weight}, z);

  Inputs shape;
  shape.batch = shape.sequences.count = x.sizes[0];
  shape.sequences.tokens = x.sizes[1];
  shape.value_heads = params.value_heads;
  shape.key_dim = params.key_dim;
  shape.value_dim = params.value_dim;
  params.state = updated_state(state, shape, x);
  params.states_out = states_of_tokens(states_out, shape, state, x);
  params.scale = 1.0 / std::sqrt(static_cast<double>(params.key_dim));
  params.eps = eps;
  params.beta_scale = beta_scale;

  const LaunchScope scope(x);
  Tensor y = empty_like(z, x.dtype);
  params.y = output_tensor(y, x.dtype);
  if (x.sizes[0] > 0) layer_step(params, scope.stream());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) { m.impl("gdn_layer_step", TORCH_BOX(&gdn_layer_step)); }

}  // namespace inlay::gdn
