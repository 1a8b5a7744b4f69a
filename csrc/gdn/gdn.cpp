// Bindings of the gdn family: check, allocate, fill parameters, launch.
#include <torch/csrc/stable/library.h>

#include "common/device.h"
#include "common/token_tensor.h"
#include "gdn/params.h"

namespace inlay::gdn {
namespace {

DType wide_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void check_dtype(const TensorInfo& tensor, DType first, DType second) {
  INLAY_CHECK(tensor.dtype == first || tensor.dtype == second, tensor.op, ": ", tensor.name, " must be ",
              name_of(first), first == second ? "" : " or ", first == second ? "" : name_of(second), ", got ",
              name_of(tensor.dtype));
}

// States are kept in float32 (float64 for float64 inputs), or in bfloat16 at half the memory.
DType second_state_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::bf16; }

void check_state_dtype(const char* op, const char* name, DType state, DType dtype) {
  INLAY_CHECK(state == wide_dtype(dtype) || state == second_state_dtype(dtype), op, ": ", name, " must be ",
              dtype == DType::f64 ? "float64" : "float32 or bfloat16", " for ", name_of(dtype), " q, got ",
              name_of(state));
}

// [N, Hv, K, V] with every [K, V] dense. The pointer is written through only where the schema says so.
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

struct InputTensors {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& g;
  const Tensor& beta;
};

// What the ops of the rule have in common. `q` is the info of tensors.q.
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
  for (const TensorInfo* tensor : {&q, &v}) {
    INLAY_CHECK(tensor->width() >= 1 && tensor->width() <= kMaxHeadDim && tensor->width() % kHeadDimMultiple == 0, op,
                ": ", tensor->name, " must have a multiple of ", kHeadDimMultiple, " up to ", kMaxHeadDim,
                " in its last dimension, got ", tensor->width());
  }
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

// A contiguous [N, Hv, K, V] where it is wanted, else [0].
std::pair<Tensor, StateTensor> empty_states(bool wanted, DType dtype, const Inputs& inputs, const TensorInfo& q) {
  const int64_t size = inputs.key_dim * inputs.value_dim;
  const int64_t sizes[] = {inputs.sequences.count, inputs.value_heads, inputs.key_dim, inputs.value_dim};
  const int64_t none = 0;
  Tensor tensor = wanted ? empty(sizes, 4, dtype, q) : empty(&none, 1, dtype, q);
  if (!wanted) return {tensor, {}};
  return {tensor, {output_tensor(tensor, dtype).data, dtype, inputs.value_heads * size, size}};
}

std::tuple<Tensor, Tensor> gated_delta_rule(const Tensor& q_tensor, const Tensor& k, const Tensor& v, const Tensor& g,
                                            const Tensor& beta, const OptionalTensor& initial_state,
                                            const OptionalTensor& cu_seqlens, double scale, bool l2norm_qk,
                                            bool output_final_state, ScalarType state_dtype, int64_t mode) {
  const char* op = "gated_delta_rule";
  const TensorInfo q(op, "q", q_tensor);
  ForwardParams params;
  params.inputs = checked_inputs(q, {q_tensor, k, v, g, beta}, initial_state, cu_seqlens, scale, l2norm_qk);
  INLAY_CHECK(mode >= 0 && mode <= static_cast<int64_t>(Mode::recurrent), op, ": mode must be 0 to ",
              static_cast<int64_t>(Mode::recurrent), ", got ", mode);
  params.mode = static_cast<Mode>(mode);
  const DType final_dtype = dtype_from(op, "state_dtype", state_dtype);
  check_state_dtype(op, "state_dtype", final_dtype, q.dtype);

  const LaunchScope scope(q);
  Tensor o = empty_like({op, "v", v}, q.dtype);
  params.o = output_tensor(o, q.dtype);
  auto [final_state, state] = empty_states(output_final_state, final_dtype, params.inputs, q);
  params.final_state = state;
  forward(params, scope.stream());
  return {o, final_state};
}

Tensor gated_delta_step(const Tensor& q_tensor, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                        const Tensor& state, const OptionalTensor& states_out, double scale, bool l2norm_qk) {
  const char* op = "gated_delta_step";
  const TensorInfo q(op, "q", q_tensor), state_info(op, "state", state);
  StepParams params;
  params.inputs = checked_inputs(q, {q_tensor, k, v, g, beta}, std::nullopt, std::nullopt, scale, l2norm_qk);
  const Inputs& inputs = params.inputs;
  const int64_t tokens = inputs.sequences.tokens, size = inputs.key_dim * inputs.value_dim;
  INLAY_CHECK(tokens >= 1 && tokens <= kMaxStepTokens, op, ": q must have 1 to ", kMaxStepTokens, " tokens, got ",
              tokens);
  params.state = state_tensor(state_info, inputs, q);
  INLAY_CHECK((params.state.head_stride == size || inputs.value_heads == 1) &&
                  (params.state.sequence_stride >= inputs.value_heads * size || inputs.batch <= 1),
              op, ": state must not overlap itself: a dense [Hv, K, V] for each of the batch");
  if (states_out) {
    const TensorInfo every(op, "states_out", *states_out);
    check_shape(every, {inputs.batch, tokens, inputs.value_heads, inputs.key_dim, inputs.value_dim}, "B, T, Hv, K, V");
    check_dtype(every, state_info.dtype, state_info.dtype);
    check_same_device(every, q);
    INLAY_CHECK(states_out->is_contiguous(), op, ": states_out must be contiguous");
    params.states_out = output_tensor(*states_out, every.dtype);
  }
  const LaunchScope scope(q);
  Tensor o = empty_like({op, "v", v}, q.dtype);
  params.o = output_tensor(o, q.dtype);
  step(params, scope.stream());
  return o;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_delta_rule_bwd(
    const Tensor& dout_tensor, const OptionalTensor& dfinal_state, const Tensor& q_tensor, const Tensor& k,
    const Tensor& v, const Tensor& g, const Tensor& beta, const OptionalTensor& initial_state,
    const OptionalTensor& cu_seqlens, double scale, bool l2norm_qk, bool needs_dinitial_state) {
  const char* op = "gated_delta_rule_bwd";
  const TensorInfo q(op, "q", q_tensor), dout(op, "dout", dout_tensor);
  BackwardParams params;
  params.inputs = checked_inputs(q, {q_tensor, k, v, g, beta}, initial_state, cu_seqlens, scale, l2norm_qk);
  const Inputs& inputs = params.inputs;
  const DType wide = wide_dtype(q.dtype);
  check_same_shape(dout, {op, "v", v});
  check_dtype(dout, q.dtype, wide);
  check_same_device(dout, q);
  params.dout = token_tensor(dout);
  if (dfinal_state) params.dfinal_state = state_tensor({op, "dfinal_state", *dfinal_state}, inputs, q);
  INLAY_CHECK(!needs_dinitial_state || initial_state, op,
              ": initial_state must be given when its gradient is wanted, got None");

  const LaunchScope scope(q);
  Tensor dq = empty_like(q, q.dtype), dk = empty_like(q, q.dtype), dv = empty_like({op, "v", v}, q.dtype);
  const TensorInfo g_info(op, "g", g);
  Tensor dg = empty_like(g_info, wide), dbeta = empty_like(g_info, inputs.beta.dtype);
  params.dq = output_tensor(dq, q.dtype);
  params.dk = output_tensor(dk, q.dtype);
  params.dv = output_tensor(dv, q.dtype);
  params.dg = output_tensor(dg, wide);
  params.dbeta = output_tensor(dbeta, inputs.beta.dtype);
  const DType state_dtype = initial_state ? inputs.initial_state.dtype : wide;
  auto [dinitial_state, state] = empty_states(needs_dinitial_state, state_dtype, inputs, q);
  params.dinitial_state = state;
  const int64_t elements = scratch_elements(params);
  const Tensor scratch = empty(&elements, 1, wide, q);
  params.scratch = output_tensor(scratch, wide).data;
  backward(params, scope.stream());
  return {dq, dk, dv, dg, dbeta, dinitial_state};
}

struct GateTensors {
  const Tensor& a;
  const Tensor& b;
  const Tensor& log_decay;
  const Tensor& dt_bias;
};

// Fills what GatesParams and GatesBackwardParams share.
template <class Params>
void set_gates(Params& params, const TensorInfo& a, const GateTensors& tensors, double beta_scale) {
  const TensorInfo b(a.op, "b", tensors.b);
  check_same_shape(b, a);
  check_same_device(b, a);
  INLAY_CHECK((b.dtype == DType::f64) == (a.dtype == DType::f64), a.op, ": b must be float64 exactly when a is, got ",
              name_of(b.dtype), " with ", name_of(a.dtype));
  params.rows = a.rows();
  params.heads = a.width();
  params.a = row_tensor(a);
  params.b = row_tensor(b);
  params.log_decay = vector_tensor(TensorInfo(a.op, "A_log", tensors.log_decay), a);
  params.dt_bias = vector_tensor(TensorInfo(a.op, "dt_bias", tensors.dt_bias), a);
  params.beta_scale = beta_scale;
}

std::tuple<Tensor, Tensor> gdn_gates(const Tensor& a_tensor, const Tensor& b, const Tensor& log_decay,
                                     const Tensor& dt_bias, double beta_scale, ScalarType beta_dtype) {
  const char* op = "gdn_gates";
  const TensorInfo a(op, "a", a_tensor);
  GatesParams params;
  set_gates(params, a, {a_tensor, b, log_decay, dt_bias}, beta_scale);
  const DType wide = wide_dtype(a.dtype), dtype = dtype_from(op, "beta_dtype", beta_dtype);
  INLAY_CHECK((dtype == DType::f64) == (wide == DType::f64), op, ": beta_dtype must be float64 exactly when a is, got ",
              name_of(dtype), " with ", name_of(a.dtype));
  const LaunchScope scope(a);
  Tensor g = empty_like(a, wide), beta = empty_like(a, dtype);
  params.g = output_tensor(g, wide);
  params.beta = output_tensor(beta, dtype);
  if (params.rows > 0 && params.heads > 0) gates(params, scope.stream());
  return {g, beta};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gdn_gates_bwd(const Tensor& dg_tensor, const Tensor& dbeta_tensor,
                                                         const Tensor& a_tensor, const Tensor& b,
                                                         const Tensor& log_decay, const Tensor& dt_bias,
                                                         double beta_scale, bool needs_vectors) {
  const char* op = "gdn_gates_bwd";
  const TensorInfo a(op, "a", a_tensor), dg(op, "dg", dg_tensor), dbeta(op, "dbeta", dbeta_tensor);
  GatesBackwardParams params;
  set_gates(params, a, {a_tensor, b, log_decay, dt_bias}, beta_scale);
  const DType wide = wide_dtype(a.dtype);
  for (const TensorInfo* gradient : {&dg, &dbeta}) {
    check_same_shape(*gradient, a);
    check_same_device(*gradient, a);
    INLAY_CHECK((gradient->dtype == DType::f64) == (wide == DType::f64), op, ": ", gradient->name,
                " must be float64 exactly when a is, got ", name_of(gradient->dtype), " with ", name_of(a.dtype));
  }
  check_dtype(dg, wide, wide);
  params.dg = row_tensor(dg);
  params.dbeta = row_tensor(dbeta);

  const LaunchScope scope(a);
  Tensor da = empty_like(a, a.dtype), db = empty_like(a, params.b.dtype);
  params.da = output_tensor(da, a.dtype);
  params.db = output_tensor(db, params.b.dtype);
  const int64_t width = needs_vectors ? params.heads : 0;
  Tensor dlog_decay = empty(&width, 1, params.log_decay.dtype, a);
  Tensor ddt_bias = empty(&width, 1, params.dt_bias.dtype, a);
  std::optional<Tensor> partials;
  if (width > 0) {
    params.dlog_decay = output_tensor(dlog_decay, params.log_decay.dtype);
    params.ddt_bias = output_tensor(ddt_bias, params.dt_bias.dtype);
    params.partial_rows = partial_rows(params);
    const int64_t sizes[] = {params.partial_rows, 2, width};
    partials = empty(sizes, 3, wide, a);
    params.partials = output_tensor(*partials, wide).data;
  }
  // Zero rows still need the sums over rows, which are zero: the kernels handle that.
  if (params.heads > 0 && (params.rows > 0 || partials)) gates_backward(params, scope.stream());
  return {da, db, dlog_decay, ddt_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("gdn_gates", TORCH_BOX(&gdn_gates));
  m.impl("gdn_gates_bwd", TORCH_BOX(&gdn_gates_bwd));
  m.impl("gated_delta_rule", TORCH_BOX(&gated_delta_rule));
  m.impl("gated_delta_rule_bwd", TORCH_BOX(&gated_delta_rule_bwd));
  m.impl("gated_delta_step", TORCH_BOX(&gated_delta_step));
}

}  // namespace inlay::gdn
