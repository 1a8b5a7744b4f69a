// Bindings of the norm family: check, allocate, fill parameters, launch.
#include "common/device.h"
#include "common/tensor.h"
#include "norm/params.h"

#include <torch/csrc/stable/library.h>

namespace inlay::norm {
namespace {

// Rows of x's shape and device, in x's dtype or, where `wide` allows it, in float32.
RowTensor rows_like(const TensorInfo& tensor, const TensorInfo& x, DType dtype, bool wide) {
  check_same_shape(tensor, x);
  check_same_device(tensor, x);
  INLAY_CHECK(tensor.dtype == dtype || (wide && tensor.dtype == DType::f32 && dtype != DType::f64), tensor.op, ": ",
              tensor.name, " must be ", name_of(dtype), wide ? " or float32" : "", ", got ", name_of(tensor.dtype));
  return row_tensor(tensor);
}

struct Statistics {
  Tensor tensor;  // [2, rows] (mean, rstd) for LayerNorm, else [1, rows] (rstd)
  void* mean = nullptr;
  void* rstd = nullptr;
};

int64_t statistics_rows(Kind kind) { return kind == Kind::layer ? 2 : 1; }

Statistics empty_statistics(const TensorInfo& x, Kind kind, int64_t rows) {
  const DType dtype = wide_dtype(x.dtype);
  const int64_t sizes[] = {statistics_rows(kind), rows};
  Statistics statistics{empty(sizes, 2, dtype, x), nullptr, nullptr};
  char* data = static_cast<char*>(output_tensor(statistics.tensor, dtype).data);
  if (kind == Kind::layer) {
    statistics.mean = data;
    data += rows * size_of(dtype);
  }
  statistics.rstd = data;
  return statistics;
}

struct ForwardArguments {
  const char* op;
  const Tensor& x;
  const Tensor* residual;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  const Tensor* gate;
  double eps;
  double weight_offset;
  int64_t kind;
  int64_t rounding;
  int64_t activation;
  bool gate_first;
  std::optional<ScalarType> residual_dtype;
  bool wants_statistics;
};

struct ForwardResults {
  Tensor y;
  std::optional<Tensor> residual_out;
  std::optional<Tensor> statistics;
};

ForwardResults run_forward(const ForwardArguments& arguments) {
  const char* op = arguments.op;
  const TensorInfo x(op, "x", arguments.x);
  ForwardParams params;
  params.rows = x.rows();
  params.width = x.width();
  params.x = row_tensor(x);
  params.eps = arguments.eps;
  params.weight_offset = arguments.weight_offset;
  params.kind = enum_from(op, "kind", arguments.kind, Kind::l2);
  params.rounding = enum_from(op, "rounding", arguments.rounding, Rounding::stepwise);
  params.activation = enum_from(op, "activation", arguments.activation, Activation::sigmoid);
  params.gate_first = arguments.gate_first;

  DType y_dtype = x.dtype;
  if (arguments.weight) {
    params.weight = vector_tensor(TensorInfo(op, "weight", *arguments.weight), x);
    if (params.rounding == Rounding::stepwise) y_dtype = promote(y_dtype, params.weight.dtype);
  }
  if (arguments.bias) {
    params.bias = vector_tensor(TensorInfo(op, "bias", *arguments.bias), x);
    if (params.rounding == Rounding::stepwise) y_dtype = promote(y_dtype, params.bias.dtype);
  }
  if (arguments.gate) {
    params.gate = rows_like(TensorInfo(op, "gate", *arguments.gate), x, x.dtype, false);
    y_dtype = x.dtype;
  }

  const LaunchScope scope(x);
  ForwardResults results{empty_like(x, y_dtype), std::nullopt, std::nullopt};
  params.y = output_tensor(results.y, y_dtype);
  if (arguments.residual) {
    params.residual = rows_like(TensorInfo(op, "residual", *arguments.residual), x, x.dtype, true);
    const DType dtype = dtype_from(op, "residual_dtype", *arguments.residual_dtype);
    INLAY_CHECK(dtype == x.dtype || dtype == wide_dtype(x.dtype), op, ": residual_dtype must be ", name_of(x.dtype),
                " or float32, got ", name_of(dtype));
    results.residual_out = empty_like(x, dtype);
    params.residual_out = output_tensor(*results.residual_out, dtype);
  }
  if (arguments.wants_statistics) {
    const Statistics statistics = empty_statistics(x, params.kind, params.rows);
    params.mean = statistics.mean;
    params.rstd = statistics.rstd;
    results.statistics = statistics.tensor;
  }
  if (params.rows > 0 && params.width > 0) forward(params, scope.stream());
  return results;
}

ForwardArguments norm_arguments(const char* op, const Tensor& x, const OptionalTensor& weight,
                                const OptionalTensor& bias, const OptionalTensor& gate, double eps,
                                double weight_offset, int64_t kind, int64_t rounding, int64_t activation,
                                bool gate_first, bool wants_statistics) {
  return {op,   x,        nullptr,    weight,     bias,         gate ? &*gate : nullptr, eps, weight_offset,
          kind, rounding, activation, gate_first, std::nullopt, wants_statistics};
}

Tensor norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& gate,
            double eps, double weight_offset, int64_t kind, int64_t rounding, int64_t activation, bool gate_first) {
  return run_forward(norm_arguments("norm", x, weight, bias, gate, eps, weight_offset, kind, rounding, activation,
                                    gate_first, false))
      .y;
}

std::tuple<Tensor, Tensor> norm_fwd(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& gate, double eps, double weight_offset, int64_t kind,
                                    int64_t rounding, int64_t activation, bool gate_first) {
  ForwardResults results = run_forward(norm_arguments("norm_fwd", x, weight, bias, gate, eps, weight_offset, kind,
                                                      rounding, activation, gate_first, true));
  return {results.y, *results.statistics};
}

ForwardArguments add_norm_arguments(const char* op, const Tensor& x, const Tensor& residual,
                                    const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                                    double weight_offset, int64_t kind, int64_t rounding, ScalarType residual_dtype,
                                    bool wants_statistics) {
  return {op,   x,        &residual, weight, bias,           nullptr,         eps, weight_offset,
          kind, rounding, 0,         false,  residual_dtype, wants_statistics};
}

std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                    const OptionalTensor& bias, double eps, double weight_offset, int64_t kind,
                                    int64_t rounding, ScalarType residual_dtype) {
  ForwardResults results = run_forward(add_norm_arguments("add_norm", x, residual, weight, bias, eps, weight_offset,
                                                          kind, rounding, residual_dtype, false));
  return {results.y, *results.residual_out};
}

std::tuple<Tensor, Tensor, Tensor> add_norm_fwd(const Tensor& x, const Tensor& residual, const OptionalTensor& weight,
                                                const OptionalTensor& bias, double eps, double weight_offset,
                                                int64_t kind, int64_t rounding, ScalarType residual_dtype) {
  ForwardResults results = run_forward(add_norm_arguments("add_norm_fwd", x, residual, weight, bias, eps, weight_offset,
                                                          kind, rounding, residual_dtype, true));
  return {results.y, *results.residual_out, *results.statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_bwd(
    const Tensor& dy_tensor, const OptionalTensor& dresidual_out, const Tensor& x_tensor, const Tensor& statistics,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& gate, double weight_offset,
    int64_t kind, int64_t activation, bool gate_first, ScalarType x_dtype, ScalarType residual_dtype,
    bool needs_dweight, bool needs_dbias) {
  const char* op = "norm_bwd";
  const TensorInfo x(op, "x", x_tensor);
  const DType dx_dtype = dtype_from(op, "x_dtype", x_dtype);
  const DType dresidual_dtype = dtype_from(op, "residual_dtype", residual_dtype);
  const DType accumulator = wide_dtype(x.dtype);
  INLAY_CHECK(x.dtype == dx_dtype || (x.dtype == DType::f32 && dx_dtype != DType::f64), op, ": x must be ",
              name_of(dx_dtype), " or float32, got ", name_of(x.dtype));
  INLAY_CHECK(dresidual_dtype == dx_dtype || dresidual_dtype == accumulator, op, ": residual_dtype must be ",
              name_of(dx_dtype), " or float32, got ", name_of(dresidual_dtype));

  BackwardParams params;
  params.rows = x.rows();
  params.width = x.width();
  params.kind = enum_from(op, "kind", kind, Kind::l2);
  params.activation = enum_from(op, "activation", activation, Activation::sigmoid);
  params.gate_first = gate_first;
  params.weight_offset = weight_offset;
  params.x = row_tensor(x);
  params.dy = rows_like(TensorInfo(op, "dy", dy_tensor), x, dx_dtype, true);
  if (dresidual_out) {
    params.dresidual_out = rows_like(TensorInfo(op, "dresidual_out", *dresidual_out), x, dx_dtype, true);
  }
  if (weight) params.weight = vector_tensor(TensorInfo(op, "weight", *weight), x);
  if (bias) params.bias = vector_tensor(TensorInfo(op, "bias", *bias), x);
  if (gate) params.gate = rows_like(TensorInfo(op, "gate", *gate), x, dx_dtype, false);
  INLAY_CHECK(!gate || (!dresidual_out && dresidual_dtype == dx_dtype), op,
              ": gate must be None when there is a residual, got both");
  INLAY_CHECK(!needs_dweight || weight, op, ": weight must be given when its gradient is wanted, got None");
  INLAY_CHECK(!needs_dbias || bias, op, ": bias must be given when its gradient is wanted, got None");

  const TensorInfo stats(op, "stats", statistics);
  const int64_t stats_rows = statistics_rows(params.kind);
  INLAY_CHECK(stats.dim == 2 && stats.sizes[0] == stats_rows && stats.sizes[1] == params.rows, op,
              ": stats must have shape [", stats_rows, ", ", params.rows, "], got ", stats.shape());
  INLAY_CHECK(stats.dtype == accumulator, op, ": stats must be ", name_of(accumulator), ", got ", name_of(stats.dtype));
  INLAY_CHECK(statistics.is_contiguous(), op, ": stats must be contiguous");
  check_same_device(stats, x);
  const char* stats_data = static_cast<const char*>(statistics.const_data_ptr());
  if (params.kind == Kind::layer) {
    params.mean = stats_data;
    stats_data += params.rows * size_of(accumulator);
  }
  params.rstd = stats_data;

  const LaunchScope scope(x);
  const int64_t none = 0;
  const auto empty_rows = [&](bool wanted, DType dtype) {
    return wanted ? empty_like(x, dtype) : empty(&none, 1, dtype, x);
  };
  Tensor dx = empty_like(x, dx_dtype);
  Tensor dresidual = empty_rows(dresidual_dtype != dx_dtype, dresidual_dtype);
  Tensor dgate = empty_rows(gate.has_value(), dx_dtype);
  const auto empty_vector = [&](bool wanted, const char* name, const OptionalTensor& vector) {
    const DType dtype = wanted ? TensorInfo(op, name, *vector).dtype : dx_dtype;
    return std::pair{empty(wanted ? &params.width : &none, 1, dtype, x), dtype};
  };
  auto [dweight, dweight_dtype] = empty_vector(needs_dweight, "weight", weight);
  auto [dbias, dbias_dtype] = empty_vector(needs_dbias, "bias", bias);
  params.dx = output_tensor(dx, dx_dtype);
  if (dresidual_dtype != dx_dtype) params.dresidual = output_tensor(dresidual, dresidual_dtype);
  if (gate) params.dgate = output_tensor(dgate, dx_dtype);
  if (needs_dweight) params.dweight = output_tensor(dweight, dweight_dtype);
  if (needs_dbias) params.dbias = output_tensor(dbias, dbias_dtype);

  // Zero rows still need the sums over rows, which are zero: the kernels handle that.
  std::optional<Tensor> partials;
  if ((needs_dweight || needs_dbias) && params.width > 0) {
    params.partial_rows = partial_rows(params);
    const int64_t sizes[] = {params.partial_rows, needs_dweight + needs_dbias, params.width};
    partials = empty(sizes, 3, accumulator, x);
    params.partials = output_tensor(*partials, accumulator).data;
  }
  if (params.width > 0 && (params.rows > 0 || partials)) backward(params, scope.stream());
  return {dx, dresidual, dgate, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_fwd", TORCH_BOX(&norm_fwd));
  m.impl("add_norm", TORCH_BOX(&add_norm));
  m.impl("add_norm_fwd", TORCH_BOX(&add_norm_fwd));
  m.impl("norm_bwd", TORCH_BOX(&norm_bwd));
}

}  // namespace inlay::norm
