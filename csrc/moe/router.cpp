// Bindings of the router: check, allocate, fill parameters, launch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/shim_utils.h>

#include "moe/inputs.h"

namespace inlay::moe {
namespace {

struct RouterArguments {
  const char* op;
  const OptionalTensor& mask;
  int64_t slots;
  int64_t scoring;
  bool renormalize;
  double scaling;
};

RouterInputs checked_router_inputs(const TensorInfo& logits, const RouterArguments& a) {
  const char* op = a.op;
  INLAY_CHECK(logits.dim == 2, op, ": logits must have 2 dimensions (tokens, experts), got ", logits.dim);
  RouterInputs in;
  in.tokens = logits.sizes[0];
  in.experts = logits.sizes[1];
  in.slots = a.slots;
  INLAY_CHECK(in.experts >= 1 && in.experts <= kMaxRoutedExperts, op, ": logits must have 1 to ", kMaxRoutedExperts,
              " columns (experts), got ", in.experts);
  INLAY_CHECK(in.slots >= 1 && in.slots <= kMaxSlots && in.slots <= in.experts, op, ": k must be 1 to ",
              std::min(kMaxSlots, in.experts), ", got ", in.slots);
  in.logits = row_tensor(logits);
  in.scoring = enum_from(op, "scoring", a.scoring, Scoring::softmax_of_chosen);
  in.renormalize = a.renormalize;
  in.scaling = a.scaling;
  if (a.mask) {
    INLAY_CHECK(a.mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool, got scalar type ",
                static_cast<int>(a.mask->scalar_type()));
    INLAY_CHECK(a.mask->numel() == in.tokens && a.mask->is_contiguous(), op, ": mask must be a contiguous [", in.tokens,
                "], got ", a.mask->numel(), " elements");
    int32_t device_type = 0, device_index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(a.mask->get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(a.mask->get(), &device_index));
    INLAY_CHECK(device_type == logits.device_type && device_index == logits.device_index, op,
                ": mask must be on logits's device");
    in.mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
  }
  return in;
}

int64_t* integers(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_router(
    const Tensor& logits_tensor, const OptionalTensor& bias, const OptionalTensor& forced_indices,
    const OptionalTensor& mask, int64_t k, int64_t scoring, bool renormalize, int64_t groups, int64_t chosen_groups,
    double scaling, ScalarType weights_dtype, bool stats) {
  const char* op = "moe_router";
  const TensorInfo logits(op, "logits", logits_tensor);
  RouterForwardParams params;
  params.inputs = checked_router_inputs(logits, {op, mask, k, scoring, renormalize, scaling});
  const RouterInputs& in = params.inputs;
  const DType wide = wide_dtype(logits.dtype);
  if (bias) params.bias = flat_values({op, "bias", *bias}, in.experts, wide, logits.dtype, logits);
  if (forced_indices) {
    params.forced = flat_indices(op, "forced_indices", *forced_indices, in.tokens * in.slots, logits);
  }
  INLAY_CHECK(groups >= 1 && in.experts % groups == 0 && (groups == 1 || in.experts / groups >= 2), op,
              ": groups must divide the experts ", in.experts, " into groups of two or more, got ", groups);
  INLAY_CHECK(chosen_groups >= 1 && chosen_groups <= groups && in.experts / groups * chosen_groups >= in.slots, op,
              ": chosen groups must be 1 to ", groups, " and hold k experts, got ", chosen_groups);
  params.groups = groups;
  params.chosen_groups = chosen_groups;
  const DType dtype = dtype_from(op, "weights_dtype", weights_dtype);
  INLAY_CHECK((dtype == DType::f64) == (logits.dtype == DType::f64), op,
              ": weights_dtype must be float64 exactly when logits are");

  const LaunchScope scope(logits);
  Tensor weights = empty_if(true, {in.tokens, in.slots}, dtype, logits);
  Tensor indices = empty_integers({in.tokens, in.slots}, ScalarType::Long, logits);
  Tensor counts = empty_integers({stats ? in.experts : 0}, ScalarType::Long, logits);
  Tensor mean = empty_if(stats, {in.experts}, wide, logits);
  Tensor logsumexp = empty_if(stats, {in.tokens}, wide, logits);
  Tensor measures = empty_if(stats, {3, in.tokens}, wide, logits);
  params.weights = output_tensor(weights, dtype);
  params.indices = integers(indices);
  if (stats) {
    params.counts = integers(counts);
    params.mean_probabilities = output_tensor(mean, wide);
    params.logsumexp = output_tensor(logsumexp, wide);
    params.measures = output_tensor(measures, wide);
  }
  Tensor scratch;
  if (const int64_t bytes = scratch_bytes(params)) {
    Scratch made = make_scratch(bytes, logits);
    scratch = made.tensor;
    params.scratch = made.data;
  }
  if (in.tokens > 0 || stats) route(params, scope.stream());
  return {weights, indices, counts, mean, logsumexp, measures};
}

Tensor moe_router_bwd(const OptionalTensor& dweights, const OptionalTensor& dmean_probabilities,
                      const OptionalTensor& dlogsumexp, const Tensor& logits_tensor, const Tensor& indices,
                      const Tensor& counts, const OptionalTensor& mask, int64_t k, int64_t scoring, bool renormalize,
                      double scaling) {
  const char* op = "moe_router_bwd";
  const TensorInfo logits(op, "logits", logits_tensor);
  RouterBackwardParams params;
  params.inputs = checked_router_inputs(logits, {op, mask, k, scoring, renormalize, scaling});
  const RouterInputs& in = params.inputs;
  const DType wide = wide_dtype(logits.dtype);
  INLAY_CHECK(indices.scalar_type() == ScalarType::Long, op, ": indices must be int64, got scalar type ",
              static_cast<int>(indices.scalar_type()));
  params.indices = static_cast<const int64_t*>(flat_indices(op, "indices", indices, in.tokens * in.slots, logits).data);
  if (dweights) {
    const TensorInfo info(op, "dweights", *dweights);
    check_shape(info, {in.tokens, in.slots}, "T, K");
    check_same_device(info, logits);
    params.dweights = row_tensor(info);
  }
  if (dmean_probabilities) {
    INLAY_CHECK(counts.scalar_type() == ScalarType::Long, op, ": counts must be int64, got scalar type ",
                static_cast<int>(counts.scalar_type()));
    params.dmean_probabilities =
        flat_values({op, "dmean_probabilities", *dmean_probabilities}, in.experts, wide, wide, logits);
    params.counts = static_cast<const int64_t*>(flat_indices(op, "counts", counts, in.experts, logits).data);
  }
  if (dlogsumexp) params.dlogsumexp = flat_values({op, "dlogsumexp", *dlogsumexp}, in.tokens, wide, wide, logits);
  for (int64_t i = 0; logits.device_type == 0 && i < in.tokens * in.slots; ++i) {
    INLAY_CHECK(params.indices[i] >= 0 && params.indices[i] < in.experts, op, ": indices must be from 0 to ",
                in.experts - 1, ", got ", params.indices[i]);
  }

  const LaunchScope scope(logits);
  Tensor dlogits = empty_like(logits, logits.dtype);
  params.dlogits = output_tensor(dlogits, logits.dtype);
  if (in.tokens > 0) route_backward(params, scope.stream());
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(inlay, INLAY_DISPATCH_KEY, m) {
  m.impl("moe_router", TORCH_BOX(&moe_router));
  m.impl("moe_router_bwd", TORCH_BOX(&moe_router_bwd));
}

}  // namespace inlay::moe
