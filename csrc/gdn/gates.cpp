// Bindings of the gates, forward and backward.
#include <torch/csrc/stable/library.h>

#include "common/device.h"
#include "gdn/inputs.h"

namespace inlay::gdn {
namespace {

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
}

}  // namespace inlay::gdn
