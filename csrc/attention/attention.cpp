// Bindings of attention, forward and backward: check, allocate, fill parameters, launch.
#include <torch/csrc/stable/library.h>

#include "attention/inputs.h"
#include "common/device.h"

namespace inlay::attention {
namespace {

struct Results {
  Tensor y;
  Tensor lse;
  Tensor o;
};

Results run_forward(const Arguments& arguments, bool wants_lse, bool wants_o) {
  const TensorInfo q(arguments.op, "q", arguments.q);
  ForwardParams params;
  params.inputs = checked_inputs(q, arguments);
  const Inputs& inputs = params.inputs;
  const DType wide = wide_dtype(q.dtype);
  const int64_t shape[] = {inputs.batch, inputs.queries.tokens, inputs.query_heads, inputs.value_dim};
  const int64_t lse_shape[] = {inputs.batch, inputs.query_heads, inputs.queries.tokens};

  const LaunchScope scope(q);
  Results results{empty(shape, 4, q.dtype, q), empty_if(wants_lse, lse_shape, 3, wide, q),
                  empty_if(wants_o, shape, 4, q.dtype, q)};
  params.y = output_tensor(results.y, q.dtype);
  if (wants_lse) params.lse = output_tensor(results.lse, wide);
  if (wants_o) params.o = output_tensor(results.o, q.dtype);
  if (inputs.batch > 0 && inputs.queries.tokens > 0 && inputs.query_heads > 0) {
    const int64_t elements = (scratch_bytes(params) + 3) / 4;
    const Tensor scratch = empty(&elements, 1, DType::f32, q);
    params.scratch = output_tensor(scratch, DType::f32).data;
    forward(params, scope.stream());
  }
  return results;
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& gate,
                 const OptionalTensor& sinks, const OptionalTensor& bias, const OptionalTensor& mask,
                 const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                 const OptionalTensor& kv_lengths, const OptionalTensor& key_ranges, const OptionalTensor& dropout_seed,
                 double scale, int64_t window_left, int64_t window_right, double softcap, double dropout_p,
                 bool allow_tf32) {
  const Arguments arguments{"attention",
                            q,
                            k,
                            v,
                            gate,
                            sinks,
                            bias,
                            mask,
                            cu_seqlens_q,
                            cu_seqlens_k,
                            kv_lengths,
                            key_ranges,
                            dropout_seed,
                            scale,
                            window_left,
                            window_right,
                            softcap,
                            dropout_p,
                            allow_tf32};
  return run_forward(arguments, false, false).y;
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                                 const OptionalTensor& gate, const OptionalTensor& sinks,
                                                 const OptionalTensor& bias, const OptionalTensor& mask,
                                                 const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                                 const OptionalTensor& kv_lengths, const OptionalTensor& key_ranges,
                                                 const OptionalTensor& dropout_seed, double scale, int64_t window_left,
                                                 int64_t window_right, double softcap, double dropout_p,
                                                 bool allow_tf32, bool wants_o) {
  const Arguments arguments{"attention_fwd",
                            q,
                            k,
                            v,
                            gate,
                            sinks,
                            bias,
                            mask,
                            cu_seqlens_q,
                            cu_seqlens_k,
                            kv_lengths,
                            key_ranges,
                            dropout_seed,
                            scale,
                            window_left,
                            window_right,
                            softcap,
                            dropout_p,
                            allow_tf32};
  Results results = run_forward(arguments, true, wants_o);
  return {results.y, results.lse, results.o};
}

// A contiguous float tensor [B, Hq, Sq].
VectorTensor row_values(const TensorInfo& tensor, const TensorInfo& q) {
  check_shape(tensor, {q.sizes[0], q.sizes[2], q.sizes[1]}, "B, Hq, Sq");
  check_same_device(tensor, q);
  const DType wide = wide_dtype(q.dtype);
  INLAY_CHECK(tensor.dtype == wide, tensor.op, ": ", tensor.name, " must be ", name_of(wide), ", got ",
              name_of(tensor.dtype));
  VectorTensor values;
  values.dtype = wide;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &values.data));
  return values;
}

// [B, Sq, Hq, DV] in q's dtype.
TokenTensor value_rows(const TensorInfo& tensor, const TensorInfo& q, int64_t value_dim) {
  check_shape(tensor, {q.sizes[0], q.sizes[1], q.sizes[2], value_dim}, "B, Sq, Hq, DV");
  check_same_device(tensor, q);
  INLAY_CHECK(tensor.dtype == q.dtype, tensor.op, ": ", tensor.name, " must be ", name_of(q.dtype), ", got ",
              name_of(tensor.dtype));
  return token_tensor(tensor);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const Tensor& dout, const OptionalTensor& dlse, const Tensor& o, const Tensor& lse, const Tensor& q_tensor,
    const Tensor& k, const Tensor& v, const OptionalTensor& gate, const OptionalTensor& sinks,
    const OptionalTensor& bias, const OptionalTensor& mask, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, const OptionalTensor& kv_lengths, const OptionalTensor& key_ranges,
    const OptionalTensor& dropout_seed, double scale, int64_t window_left, int64_t window_right, double softcap,
    double dropout_p, bool allow_tf32, bool needs_dbias, bool deterministic) {
  const char* op = "attention_bwd";
  const Arguments arguments{
      op,           q_tensor,     k,          v,          gate,         sinks, bias,        mask,
      cu_seqlens_q, cu_seqlens_k, kv_lengths, key_ranges, dropout_seed, scale, window_left, window_right,
      softcap,      dropout_p,    allow_tf32};
  const TensorInfo q(op, "q", q_tensor);
  BackwardParams params;
  params.inputs = checked_inputs(q, arguments);
  const Inputs& inputs = params.inputs;
  params.dout = value_rows({op, "dout", dout}, q, inputs.value_dim);
  params.o = value_rows({op, "o", o}, q, inputs.value_dim);
  INLAY_CHECK(lse.is_contiguous() && (!dlse || dlse->is_contiguous()), op, ": lse and dlse must be contiguous");
  params.lse = row_values({op, "lse", lse}, q);
  if (dlse) params.dlse = row_values({op, "dlse", *dlse}, q);
  INLAY_CHECK(!needs_dbias || bias, op, ": bias must be given when its gradient is wanted, got None");
  params.deterministic = deterministic;

  const LaunchScope scope(q);
  Tensor dq = empty_like(q, q.dtype), dk = empty_like({op, "k", k}, q.dtype), dv = empty_like({op, "v", v}, q.dtype);
  const TensorInfo dout_info(op, "dout", dout);
  Tensor dgate = empty_if(gate.has_value(), dout_info.sizes, 4, q.dtype, q);
  Tensor dsinks = empty_if(sinks.has_value(), &inputs.query_heads, 1, sinks ? inputs.sinks.dtype : q.dtype, q);
  int64_t bias_shape[4] = {0, 0, 0, 0};
  for (int i = 0; needs_dbias && i < 4; ++i) bias_shape[i] = bias->size(i);
  const DType bias_dtype = needs_dbias ? inputs.bias.dtype : q.dtype;
  Tensor dbias = empty_if(needs_dbias, bias_shape, 4, bias_dtype, q);
  params.dq = output_tensor(dq, q.dtype);
  params.dk = output_tensor(dk, q.dtype);
  params.dv = output_tensor(dv, q.dtype);
  if (gate) params.dgate = output_tensor(dgate, q.dtype);
  if (sinks) params.dsinks = output_tensor(dsinks, inputs.sinks.dtype);
  if (needs_dbias) {
    params.dbias.data = output_tensor(dbias, bias_dtype).data;
    params.dbias.dtype = bias_dtype;
    for (int i = 0; i < 4; ++i) params.dbias.sizes[i] = bias_shape[i];
  }
  const int64_t elements = (scratch_bytes(params) + 3) / 4;
  const Tensor scratch = empty(&elements, 1, DType::f32, q);
  params.scratch = output_tensor(scratch, DType::f32).data;
  backward(params, scope.stream());
  return {dq, dk, dv, dgate, dsinks, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace inlay::attention
