// Every op's schema: the table of contents of the native side. Implementations are in csrc/<family>/<family>.cpp,
// fakes and autograd in python/inlay/ops/<family>.py. Arguments only ever grow at the end, with defaults.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(inlay, m) {
  // norm. `norm` and `add_norm` are for inference; the `_fwd` ops also return what the backward needs.
  m.def(
      "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? gate, float eps, float weight_offset, int kind, "
      "int rounding, int activation, bool gate_first) -> Tensor");
  m.def(
      "norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? gate, float eps, float weight_offset, int kind, "
      "int rounding, int activation, bool gate_first) -> (Tensor y, Tensor stats)");
  m.def(
      "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, int kind, "
      "int rounding, ScalarType residual_dtype) -> (Tensor y, Tensor residual_out)");
  m.def(
      "add_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float weight_offset, int kind, "
      "int rounding, ScalarType residual_dtype) -> (Tensor y, Tensor residual_out, Tensor stats)");
  m.def(
      "norm_bwd(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor stats, Tensor? weight, Tensor? bias, Tensor? gate, "
      "float weight_offset, int kind, int activation, bool gate_first, ScalarType x_dtype, ScalarType residual_dtype, "
      "bool needs_dweight, bool needs_dbias) -> (Tensor dx, Tensor dresidual, Tensor dgate, Tensor dweight, "
      "Tensor dbias)");

  // attention. `attention` is for inference; `attention_fwd` also returns what the backward needs: the logarithms of
  // the softmax's denominators and, empty unless wanted, the result before the gate.
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? sinks, Tensor? bias, Tensor? mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? kv_lengths, Tensor? key_ranges, Tensor? dropout_seed, "
      "float scale, int window_left, int window_right, float softcap, float dropout_p, bool allow_tf32) -> Tensor");
  m.def(
      "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? gate, Tensor? sinks, Tensor? bias, Tensor? mask, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? kv_lengths, Tensor? key_ranges, Tensor? dropout_seed, "
      "float scale, int window_left, int window_right, float softcap, float dropout_p, bool allow_tf32, "
      "bool wants_o) -> (Tensor y, Tensor lse, Tensor o)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor o, Tensor lse, Tensor q, Tensor k, Tensor v, Tensor? gate, "
      "Tensor? sinks, Tensor? bias, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? kv_lengths, "
      "Tensor? key_ranges, Tensor? dropout_seed, float scale, int window_left, int window_right, float softcap, "
      "float dropout_p, bool allow_tf32, bool needs_dbias, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv, "
      "Tensor dgate, Tensor dsinks, Tensor dbias)");

  // conv. A final state is empty unless wanted.
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? cu_seqlens, "
      "int activation, bool wants_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd(Tensor dy, Tensor? dfinal_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, int activation, bool needs_dweight, bool needs_dbias, "
      "bool needs_dinitial_state) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dinitial_state)");
  m.def(
      "causal_conv1d_step(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, "
      "int activation) -> Tensor");

  // gdn. What the backward needs are the inputs alone, so one op is the forward with and without gradients.
  m.def(
      "gdn_gates(Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, float beta_scale, ScalarType beta_dtype) -> "
      "(Tensor g, Tensor beta)");
  m.def(
      "gdn_gates_bwd(Tensor dg, Tensor dbeta, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, float beta_scale, "
      "bool needs_vectors) -> (Tensor da, Tensor db, Tensor dA_log, Tensor ddt_bias)");
  m.def(
      "gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, "
      "Tensor? cu_seqlens, float scale, bool l2norm_qk, bool output_final_state, ScalarType state_dtype, int mode) -> "
      "(Tensor o, Tensor final_state)");
  m.def(
      "gated_delta_rule_bwd(Tensor dout, Tensor? dfinal_state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
      "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool l2norm_qk, bool needs_dinitial_state) -> "
      "(Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state)");
  m.def(
      "gated_delta_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, "
      "Tensor(b!)? states_out, float scale, bool l2norm_qk) -> Tensor");
  m.def(
      "gdn_layer_step(Tensor mixed_qkv, Tensor z, Tensor a, Tensor b, Tensor conv_weight, Tensor? conv_bias, "
      "Tensor A_log, Tensor dt_bias, Tensor norm_weight, Tensor(a!) conv_state, Tensor(b!) state, "
      "Tensor(c!)? states_out, int key_heads, float eps, float beta_scale) -> Tensor");

  // moe. Experts work on rows, one for each token and slot that has one, sorted by expert: `rows` [T * K] says which,
  // and `ends` [E] where each expert's end; given instead of `indices`, x is sorted itself. `moe_experts` is for
  // inference; `_fwd` also returns what the backward needs: `h`, before the activation, empty unless wanted, and the
  // rows. A router whose `stats` are not wanted returns empty ones; a gradient that is not needed is empty.
  m.def(
      "moe_router(Tensor logits, Tensor? bias, Tensor? forced_indices, Tensor? mask, int k, int scoring, "
      "bool renormalize, int groups, int chosen_groups, float scaling, ScalarType weights_dtype, bool stats) -> "
      "(Tensor weights, Tensor indices, Tensor counts, Tensor mean_probabilities, Tensor logsumexp, Tensor measures)");
  m.def(
      "moe_router_bwd(Tensor? dweights, Tensor? dmean_probabilities, Tensor? dlogsumexp, Tensor logits, "
      "Tensor indices, Tensor counts, Tensor? mask, int k, int scoring, bool renormalize, float scaling) -> Tensor");
  m.def(
      "moe_experts(Tensor x, Tensor? indices, Tensor? weights, Tensor? ends, Tensor gate_up_proj, Tensor down_proj, "
      "Tensor? gate_up_bias, Tensor? down_bias, Tensor? shared, Tensor? shared_gate, int activation, bool gated, "
      "bool interleaved, bool transposed, float limit) -> Tensor");
  m.def(
      "moe_experts_fwd(Tensor x, Tensor? indices, Tensor? weights, Tensor? ends, Tensor gate_up_proj, "
      "Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, Tensor? shared, Tensor? shared_gate, "
      "int activation, bool gated, bool interleaved, bool transposed, float limit, bool wants_h) -> "
      "(Tensor y, Tensor h, Tensor rows, Tensor ends)");
  m.def(
      "moe_experts_bwd(Tensor dy, Tensor x, Tensor? h, Tensor rows, Tensor ends, Tensor? weights, "
      "Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, Tensor? shared, "
      "Tensor? shared_gate, int slots, int activation, bool gated, bool interleaved, bool transposed, float limit, "
      "bool needs_dx, bool needs_dweights, bool needs_dgate_up_proj, bool needs_ddown_proj, "
      "bool needs_dgate_up_bias, bool needs_ddown_bias, bool needs_dshared, bool needs_dshared_gate) -> "
      "(Tensor dx, Tensor dweights, Tensor dgate_up_proj, Tensor ddown_proj, Tensor dgate_up_bias, "
      "Tensor ddown_bias, Tensor dshared, Tensor dshared_gate)");

  // rope. What the backward needs are the inputs alone.
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight, int rotary_dim, "
      "float eps, float weight_offset, int rounding, int rotary_rounding, bool interleaved) -> "
      "(Tensor q_out, Tensor k_out)");
  m.def(
      "qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight, "
      "Tensor? k_weight, int rotary_dim, float eps, float weight_offset, bool interleaved, bool needs_dq_weight, "
      "bool needs_dk_weight) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)");
}
