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
}
