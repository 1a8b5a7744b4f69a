// Bindings of the gated delta rule, forward and step by step: check, allocate, fill parameters, launch.
#include <torch/csrc/stable/library.h>

#include "common/device.h"
#include "gdn/inputs.h"

namespace inlay::gdn {
namespace {

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
  const int64_t elements = scratch_elements(params);
  const Tensor scratch = empty(&elements, 1, wide_dtype(q.dtype), q);
  params.scratch = output_tensor(scratch, wide_dtype(q.dtype)).data;
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
  const int64_t tokens = inputs.sequences.tokens;
  INLAY_CHECK(tokens >= 1 && tokens <= kMaxStepTokens, op, ": q must have 1 to ", kMaxStepTokens, " tokens, got ",
              tokens);
  params.state = updated_state(state_info, inputs, q);
  params.states_out = states_of_tokens(states_out, inputs, state_info, q);
  const LaunchScope scope(q);
  Tensor o = empty_like({op, "v", v}, q.dtype);
  params.o = output_tensor(o, q.dtype);
  step(params, scope.stream());
  return o;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("gated_delta_rule", TORCH_BOX(&gated_delta_rule));
  m.impl("gated_delta_step", TORCH_BOX(&gated_delta_step));
}

}  // namespace inlay::gdn
