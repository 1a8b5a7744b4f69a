// Binding of the gated delta rule's backward.
#include <torch/csrc/stable/library.h>

#include "common/device.h"
#include "gdn/inputs.h"

namespace inlay::gdn {
namespace {

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("gated_delta_rule_bwd", TORCH_BOX(&gated_delta_rule_bwd));
}

}  // namespace inlay::gdn
