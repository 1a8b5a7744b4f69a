// Bindings of the rope family: check, allocate, fill parameters, launch.
#include <optional>
#include <tuple>

#include "common/device.h"
#include "common/rounding.h"
#include "common/token_tensor.h"
#include "rope/params.h"

#include <torch/csrc/stable/library.h>

namespace inlay::rope {
namespace {

struct Arguments {
  const char* op;
  const Tensor& q;
  const Tensor& k;
  const Tensor& cos;
  const Tensor& sin;
  const OptionalTensor& q_weight;
  const OptionalTensor& k_weight;
  int64_t rotary_dim;
  double eps;
  double weight_offset;
  bool interleaved;
};

// The tensors of a call, their metadata read once.
struct Inputs {
  explicit Inputs(const Arguments& a)
      : q(a.op, "q", a.q), k(a.op, "k", a.k), cos(a.op, "cos", a.cos), sin(a.op, "sin", a.sin) {
    if (a.q_weight) q_weight.emplace(a.op, "q_weight", *a.q_weight);
    if (a.k_weight) k_weight.emplace(a.op, "k_weight", *a.k_weight);
  }

  TensorInfo q, k, cos, sin;
  std::optional<TensorInfo> q_weight, k_weight;
};

// A table [B, S, columns], [1, S, columns] or [S, columns].
Table table(const TensorInfo& tensor, const TensorInfo& q, int64_t columns) {
  const int64_t batch = q.sizes[0], tokens = q.sizes[1];
  if (tensor.dim == 2) {
    check_shape(tensor, {tokens, columns}, "tokens, angles");
  } else {
    const bool shared = tensor.dim == 3 && tensor.sizes[0] == 1;
    check_shape(tensor, {shared ? 1 : batch, tokens, columns}, "q's batch or 1, tokens, angles");
  }
  check_dense_rows(tensor);
  check_same_device(tensor, q);
  Table result;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.handle, &result.data));
  result.token_stride = tensor.strides[tensor.dim - 2];
  result.batch_stride = tensor.dim == 3 && tensor.sizes[0] > 1 ? tensor.strides[0] : 0;
  return result;
}

// Fills what forward and backward share, and checks all of it.
void fill(Problem& problem, const Arguments& a, const Inputs& in) {
  const char* op = a.op;
  INLAY_CHECK(in.q.dim == 4, op, ": q must have 4 dimensions (batch, tokens, heads, width), got ", in.q.dim);
  INLAY_CHECK(in.k.dim == 4, op, ": k must have 4 dimensions (batch, tokens, heads, width), got ", in.k.dim);
  problem.batch = in.q.sizes[0];
  problem.tokens = in.q.sizes[1];
  problem.width = in.q.sizes[3];
  problem.dtype = in.q.dtype;
  check_shape(in.k, {problem.batch, problem.tokens, in.k.sizes[2], problem.width},
              "q's batch, tokens, heads, q's width");
  check_same_device(in.k, in.q);
  INLAY_CHECK(in.k.dtype == in.q.dtype, op, ": k must be ", name_of(in.q.dtype), ", got ", name_of(in.k.dtype));
  INLAY_CHECK(a.rotary_dim >= 0 && a.rotary_dim <= problem.width && a.rotary_dim % 2 == 0, op,
              ": rotary_dim must be even and at most ", problem.width, " (q's width), got ", a.rotary_dim);
  problem.rotary = a.rotary_dim;
  problem.interleaved = a.interleaved;
  problem.one_angle_per_pair = in.cos.width() != a.rotary_dim;
  const bool half = size_of(in.q.dtype) == 2;
  INLAY_CHECK(in.cos.dtype == in.q.dtype || (half && in.cos.dtype == DType::f32), op, ": cos must be ",
              name_of(in.q.dtype), half ? " or float32" : "", ", got ", name_of(in.cos.dtype));
  INLAY_CHECK(in.sin.dtype == in.cos.dtype, op, ": sin must be ", name_of(in.cos.dtype), ", got ",
              name_of(in.sin.dtype));
  problem.angles = in.cos.dtype;
  problem.cos = table(in.cos, in.q, problem.angle_columns());
  problem.sin = table(in.sin, in.q, problem.angle_columns());
  INLAY_CHECK(in.q_weight.has_value() == in.k_weight.has_value(), op,
              ": k_weight must be given exactly when q_weight is, got ", in.k_weight ? "a tensor" : "None");
  problem.normalises = in.q_weight.has_value();
  problem.eps = a.eps;
  problem.weight_offset = a.weight_offset;
}

Tensor empty_result(const Problem& problem, int64_t heads, const TensorInfo& q) {
  const int64_t sizes[] = {problem.batch, problem.tokens, heads, problem.width};
  return empty(sizes, 4, problem.dtype, q);
}

bool has_work(const Problem& problem, int64_t heads) {
  return problem.batch > 0 && problem.tokens > 0 && heads > 0 && problem.width > 0;
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                        const OptionalTensor& q_weight, const OptionalTensor& k_weight,
                                        int64_t rotary_dim, double eps, double weight_offset, int64_t rounding,
                                        int64_t rotary_rounding, bool interleaved) {
  const char* op = "qk_norm_rope";
  const Arguments arguments{op, q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, interleaved};
  const Inputs in(arguments);
  ForwardParams params;
  fill(params, arguments, in);
  const bool norm_stepwise = enum_from(op, "rounding", rounding, Rounding::stepwise) == Rounding::stepwise;
  const bool rotary_stepwise =
      enum_from(op, "rotary_rounding", rotary_rounding, Rounding::stepwise) == Rounding::stepwise;

  const LaunchScope scope(in.q);
  const auto fill_side = [&](ForwardSide& side, const TensorInfo& x, const std::optional<TensorInfo>& weight) {
    side.heads = x.sizes[2];
    side.x = token_tensor(x);
    bool rounded = true;  // what is rotated has x's dtype
    if (weight) {
      side.weight = vector_tensor(*weight, x);
      side.rounds_normalised = norm_stepwise;
      rounded = side.rounds_weighted = !norm_stepwise || weight->dtype == x.dtype;
    }
    side.rounds_products = rotary_stepwise && rounded && params.angles == params.dtype;
    Tensor y = empty_result(params, side.heads, in.q);
    side.y = output_tensor(y, params.dtype);
    return y;
  };
  Tensor q_out = fill_side(params.q, in.q, in.q_weight);
  Tensor k_out = fill_side(params.k, in.k, in.k_weight);
  if (has_work(params, params.q.heads + params.k.heads)) forward(params, scope.stream());
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qk_norm_rope_bwd(const Tensor& dq_out, const Tensor& dk_out, const Tensor& q,
                                                            const Tensor& k, const Tensor& cos, const Tensor& sin,
                                                            const OptionalTensor& q_weight,
                                                            const OptionalTensor& k_weight, int64_t rotary_dim,
                                                            double eps, double weight_offset, bool interleaved,
                                                            bool needs_dq_weight, bool needs_dk_weight) {
  const char* op = "qk_norm_rope_bwd";
  const Arguments arguments{op, q, k, cos, sin, q_weight, k_weight, rotary_dim, eps, weight_offset, interleaved};
  const Inputs in(arguments);
  const TensorInfo dq_info(op, "dq_out", dq_out), dk_info(op, "dk_out", dk_out);
  BackwardParams params;
  fill(params, arguments, in);

  const LaunchScope scope(in.q);
  const int64_t none = 0;
  struct Results {
    Tensor dx, dweight;
  };
  const auto fill_side = [&](BackwardSide& side, const TensorInfo& x, const TensorInfo& dy,
                             const std::optional<TensorInfo>& weight, bool needs_dweight, const char* weight_name) {
    check_same_shape(dy, x);
    check_same_device(dy, x);
    INLAY_CHECK(dy.dtype == x.dtype, op, ": ", dy.name, " must be ", name_of(x.dtype), ", got ", name_of(dy.dtype));
    INLAY_CHECK(!needs_dweight || weight, op, ": ", weight_name,
                " must be given when its gradient is wanted, got None");
    side.heads = x.sizes[2];
    side.x = token_tensor(x);
    side.dy = token_tensor(dy);
    if (weight) side.weight = vector_tensor(*weight, x);
    const DType dweight_dtype = needs_dweight ? weight->dtype : params.dtype;
    Results results{empty_result(params, side.heads, in.q),
                    empty(needs_dweight ? &params.width : &none, 1, dweight_dtype, in.q)};
    side.dx = output_tensor(results.dx, params.dtype);
    if (needs_dweight) side.dweight = output_tensor(results.dweight, dweight_dtype);
    return results;
  };
  Results q_results = fill_side(params.q, in.q, dq_info, in.q_weight, needs_dq_weight, "q_weight");
  Results k_results = fill_side(params.k, in.k, dk_info, in.k_weight, needs_dk_weight, "k_weight");

  // Without tokens the sums over them are zero all the same: the kernels handle that.
  std::optional<Tensor> partials;
  const bool wants_sums = (needs_dq_weight || needs_dk_weight) && params.width > 0;
  if (wants_sums) {
    const PartialRows rows = partial_rows(params);
    params.q.partial_rows = needs_dq_weight ? rows.q : 0;
    params.k.partial_rows = needs_dk_weight ? rows.k : 0;
    const DType dtype = wide_dtype(params.dtype);
    const int64_t sizes[] = {params.q.partial_rows + params.k.partial_rows, params.width};
    partials = empty(sizes, 2, dtype, in.q);
    char* data = static_cast<char*>(output_tensor(*partials, dtype).data);
    if (needs_dq_weight) params.q.partials = data;
    if (needs_dk_weight) params.k.partials = data + params.q.partial_rows * params.width * size_of(dtype);
  }
  if (wants_sums || has_work(params, params.q.heads + params.k.heads)) backward(params, scope.stream());
  return {q_results.dx, k_results.dx, q_results.dweight, k_results.dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_bwd", TORCH_BOX(&qk_norm_rope_bwd));
}

}  // namespace inlay::rope
