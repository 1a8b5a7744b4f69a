// Bindings of the experts: check, allocate, fill parameters, launch.
#include <torch/csrc/stable/library.h>

#include "moe/inputs.h"

namespace inlay::moe {
namespace {

int32_t* integers(const Tensor& tensor) { return static_cast<int32_t*>(tensor.mutable_data_ptr()); }

struct ForwardResults {
  Tensor y;
  Tensor h;
  Tensor rows;
  Tensor ends;
};

ForwardResults run_forward(const char* op, const Tensor& x_tensor, const OptionalTensor& indices,
                           const OptionalTensor& weights, const OptionalTensor& row_ends, const Tensor& gate_up_proj,
                           const Tensor& down_proj, const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias,
                           const OptionalTensor& shared, const OptionalTensor& shared_gate, int64_t activation,
                           bool gated, bool interleaved, bool transposed, double limit, bool keeps_rows, bool wants_h) {
  const TensorInfo x(op, "x", x_tensor);
  INLAY_CHECK(indices.has_value() != row_ends.has_value(), op, ": one of indices and ends must be given, got ",
              indices ? "both" : "neither");
  INLAY_CHECK(!indices || indices->dim() == 2, op, ": indices must have 2 dimensions (tokens, slots), got ",
              indices ? indices->dim() : 0);
  const int64_t slots = indices ? indices->size(1) : 1;
  ExpertForwardParams params;
  params.inputs = checked_inputs(x, {op, x_tensor, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, shared,
                                     shared_gate, slots, activation, gated, interleaved, transposed, limit});
  const ExpertInputs& in = params.inputs;
  params.sorted = !indices.has_value();
  params.keeps_rows = keeps_rows;
  if (indices) {
    INLAY_CHECK(indices->size(0) == in.tokens, op, ": indices must have x's ", in.tokens, " rows, got ",
                indices->size(0));
    params.indices = flat_indices(op, "indices", *indices, in.most_rows(), x);
  } else {
    params.ends = flat_indices(op, "ends", *row_ends, in.experts, x);
  }

  const LaunchScope scope(x);
  ForwardResults results{empty_like(x, x.dtype), empty_if(wants_h, {in.most_rows(), in.pre_activations()}, x.dtype, x),
                         empty_integers({in.most_rows()}, ScalarType::Int, x),
                         empty_integers({in.experts}, ScalarType::Int, x)};
  params.rows = {integers(results.rows), integers(results.ends)};
  params.y = output_tensor(results.y, x.dtype);
  if (wants_h) params.h = output_tensor(results.h, x.dtype);
  const Scratch scratch = make_scratch(scratch_bytes(params), x);
  params.scratch = scratch.data;
  forward(params, scope.stream());
  return results;
}

Tensor moe_experts(const Tensor& x, const OptionalTensor& indices, const OptionalTensor& weights,
                   const OptionalTensor& ends, const Tensor& gate_up_proj, const Tensor& down_proj,
                   const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& shared,
                   const OptionalTensor& shared_gate, int64_t activation, bool gated, bool interleaved, bool transposed,
                   double limit) {
  return run_forward("moe_experts", x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias, shared,
                     shared_gate, activation, gated, interleaved, transposed, limit, false, false)
      .y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_experts_fwd(
    const Tensor& x, const OptionalTensor& indices, const OptionalTensor& weights, const OptionalTensor& ends,
    const Tensor& gate_up_proj, const Tensor& down_proj, const OptionalTensor& gate_up_bias,
    const OptionalTensor& down_bias, const OptionalTensor& shared, const OptionalTensor& shared_gate,
    int64_t activation, bool gated, bool interleaved, bool transposed, double limit, bool wants_h) {
  ForwardResults results =
      run_forward("moe_experts_fwd", x, indices, weights, ends, gate_up_proj, down_proj, gate_up_bias, down_bias,
                  shared, shared_gate, activation, gated, interleaved, transposed, limit, true, wants_h);
  return {results.y, results.h, results.rows, results.ends};
}

// A tensor of rows as wide as told, in x's dtype.
RowTensor rows_like_x(const TensorInfo& tensor, const TensorInfo& x, std::initializer_list<int64_t> sizes,
                      const char* names) {
  check_shape(tensor, sizes, names);
  check_same_device(tensor, x);
  check_dtype(tensor, x.dtype, x.dtype);
  return row_tensor(tensor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_experts_bwd(
    const Tensor& dy, const Tensor& x_tensor, const OptionalTensor& h, const Tensor& rows, const Tensor& ends,
    const OptionalTensor& weights, const Tensor& gate_up_proj, const Tensor& down_proj,
    const OptionalTensor& gate_up_bias, const OptionalTensor& down_bias, const OptionalTensor& shared,
    const OptionalTensor& shared_gate, int64_t slots, int64_t activation, bool gated, bool interleaved, bool transposed,
    double limit, bool needs_dx, bool needs_dweights, bool needs_dgate_up_proj, bool needs_ddown_proj,
    bool needs_dgate_up_bias, bool needs_ddown_bias, bool needs_dshared, bool needs_dshared_gate) {
  const char* op = "moe_experts_bwd";
  const TensorInfo x(op, "x", x_tensor);
  ExpertBackwardParams params;
  params.inputs = checked_inputs(x, {op, x_tensor, weights, gate_up_proj, down_proj, gate_up_bias, down_bias, shared,
                                     shared_gate, slots, activation, gated, interleaved, transposed, limit});
  const ExpertInputs& in = params.inputs;
  INLAY_CHECK(rows.scalar_type() == ScalarType::Int && ends.scalar_type() == ScalarType::Int, op,
              ": rows and ends must be int32");
  params.rows = {
      const_cast<int32_t*>(static_cast<const int32_t*>(flat_indices(op, "rows", rows, in.most_rows(), x).data)),
      const_cast<int32_t*>(static_cast<const int32_t*>(flat_indices(op, "ends", ends, in.experts, x).data))};
  params.dy = rows_like_x({op, "dy", dy}, x, {in.tokens, in.hidden}, "T, H");
  if (h) params.h = rows_like_x({op, "h", *h}, x, {in.most_rows(), in.pre_activations()}, "T * K, first projection");
  INLAY_CHECK(!h || h->is_contiguous(), op, ": h must be contiguous");
  INLAY_CHECK(!needs_dweights || weights, op, ": weights must be given when their gradient is wanted, got None");
  INLAY_CHECK(!needs_dgate_up_bias || gate_up_bias, op,
              ": gate_up_bias must be given when its gradient is wanted, got None");
  INLAY_CHECK(!needs_ddown_bias || down_bias, op, ": down_bias must be given when its gradient is wanted, got None");
  INLAY_CHECK(!needs_dshared || shared, op, ": shared must be given when its gradient is wanted, got None");
  INLAY_CHECK(!needs_dshared_gate || shared_gate, op,
              ": shared_gate must be given when its gradient is wanted, got None");

  const LaunchScope scope(x);
  const int64_t width = in.pre_activations();
  const DType dtype = x.dtype;
  const auto result = [&](bool wanted, std::initializer_list<int64_t> sizes, DType result_dtype, OutputTensor& out) {
    Tensor tensor = empty_if(wanted, sizes, result_dtype, x);
    if (wanted) out = output_tensor(tensor, result_dtype);
    return tensor;
  };
  const auto matrix = [&](bool wanted, int64_t out_size, int64_t in_size, OutputTensor& out) {
    if (in.transposed) std::swap(out_size, in_size);
    return result(wanted, {in.experts, out_size, in_size}, dtype, out);
  };
  Tensor dx = result(needs_dx, {in.tokens, in.hidden}, dtype, params.dx);
  Tensor dweights = result(needs_dweights, {in.tokens, in.slots}, weights ? in.weights.dtype : dtype, params.dweights);
  Tensor dgate_up_proj = matrix(needs_dgate_up_proj, width, in.hidden, params.dgate_up_proj);
  Tensor ddown_proj = matrix(needs_ddown_proj, in.hidden, in.intermediate, params.ddown_proj);
  Tensor dgate_up_bias = result(needs_dgate_up_bias, {in.experts, width}, gate_up_bias ? in.gate_up_bias.dtype : dtype,
                                params.dgate_up_bias);
  Tensor ddown_bias =
      result(needs_ddown_bias, {in.experts, in.hidden}, down_bias ? in.down_bias.dtype : dtype, params.ddown_bias);
  Tensor dshared = result(needs_dshared, {in.tokens, in.hidden}, dtype, params.dshared);
  Tensor dshared_gate =
      result(needs_dshared_gate, {in.tokens}, shared_gate ? in.shared_gate.dtype : dtype, params.dshared_gate);
  const Scratch scratch = make_scratch(scratch_bytes(params), x);
  params.scratch = scratch.data;
  backward(params, scope.stream());
  return {dx, dweights, dgate_up_proj, ddown_proj, dgate_up_bias, ddown_bias, dshared, dshared_gate};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("moe_experts", TORCH_BOX(&moe_experts));
  m.impl("moe_experts_fwd", TORCH_BOX(&moe_experts_fwd));
  m.impl("moe_experts_bwd", TORCH_BOX(&moe_experts_bwd));
}

}  // namespace inlay::moe
