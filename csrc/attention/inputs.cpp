#include "attention/inputs.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cmath>

namespace inlay::attention {
namespace {

void check_dtype(const TensorInfo& tensor, DType first, DType second) {
  INLAY_CHECK(tensor.dtype == first || tensor.dtype == second, tensor.op, ": ", tensor.name, " must be ",
              name_of(first), first == second ? "" : " or ", first == second ? "" : name_of(second), ", got ",
              name_of(tensor.dtype));
}

void check_head_dim(const TensorInfo& tensor) {
  const int64_t size = tensor.width();
  INLAY_CHECK(size >= 1 && size <= kMaxHeadDim && size % kHeadDimMultiple == 0, tensor.op, ": ", tensor.name,
              " must have a multiple of ", kHeadDimMultiple, " up to ", kMaxHeadDim, " in its last dimension, got ",
              size);
}

void check_on_device(const char* name, const Tensor& tensor, const TensorInfo& q) {
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
  INLAY_CHECK(device_type == q.device_type && device_index == q.device_index, q.op, ": ", name,
              " must be on q's device");
}

// A tensor that is broadcast to [B, Hq, Sq, Sk] by dimensions of 1.
ScoreTensor score_tensor(const char* name, const Tensor& tensor, const TensorInfo& q, const Inputs& inputs) {
  check_on_device(name, tensor, q);
  INLAY_CHECK(tensor.dim() == 4, q.op, ": ", name, " must have 4 dimensions, got ", tensor.dim());
  const int64_t full[] = {inputs.batch, inputs.query_heads, inputs.queries.tokens, inputs.keys.tokens};
  ScoreTensor scores;
  int64_t* strides[] = {&scores.batch_stride, &scores.head_stride, &scores.query_stride, &scores.key_stride};
  for (int i = 0; i < 4; ++i) {
    const int64_t size = tensor.size(i);
    INLAY_CHECK(size == full[i] || size == 1, q.op, ": ", name, " must be broadcastable to [B, Hq, Sq, Sk], got size ",
                size, " for ", full[i], " in dimension ", i);
    *strides[i] = size == 1 ? 0 : tensor.stride(i);
  }
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &scores.data));
  return scores;
}

VectorTensor sink_tensor(const TensorInfo& sinks, const TensorInfo& q) {
  check_shape(sinks, {q.sizes[2]}, "Hq");
  check_dtype(sinks, q.dtype, wide_dtype(q.dtype));
  check_same_device(sinks, q);
  check_dense_rows(sinks);
  VectorTensor vector;
  vector.dtype = sinks.dtype;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(sinks.handle, &vector.data));
  return vector;
}

KeyRanges key_ranges_of(const Tensor& tensor, const TensorInfo& q) {
  const char* name = "key_ranges";
  INLAY_CHECK(tensor.scalar_type() == ScalarType::Int, q.op, ": ", name, " must be int32, got scalar type ",
              static_cast<int>(tensor.scalar_type()));
  check_on_device(name, tensor, q);
  INLAY_CHECK(tensor.dim() == 3 && (tensor.size(0) == q.sizes[0] || tensor.size(0) == 1) &&
                  tensor.size(1) == q.sizes[1] && tensor.size(2) == 2,
              q.op, ": ", name, " must have shape [B or 1, Sq, 2], got ", tensor.dim(), " dimensions and ",
              tensor.numel(), " elements");
  INLAY_CHECK(tensor.stride(2) == 1, q.op, ": ", name, " must have stride 1 in its last dimension, got ",
              tensor.stride(2));
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &data));
  return {static_cast<const int32_t*>(data), tensor.size(0) == 1 ? 0 : tensor.stride(0), tensor.stride(1)};
}

Dropout dropout_of(const Arguments& a, const TensorInfo& q) {
  INLAY_CHECK(a.dropout_p >= 0 && a.dropout_p < 1, q.op, ": dropout_p must be at least 0 and below 1, got ",
              std::to_string(a.dropout_p));
  INLAY_CHECK((a.dropout_p > 0) == a.dropout_seed.has_value(), q.op,
              ": dropout_seed must be given exactly when dropout_p is above 0");
  if (!a.dropout_seed) return {};
  const Tensor& seed = *a.dropout_seed;
  INLAY_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, q.op,
              ": dropout_seed must be one int64, got ", seed.numel(), " elements of scalar type ",
              static_cast<int>(seed.scalar_type()));
  check_on_device("dropout_seed", seed, q);
  constexpr double kSteps = 65536;
  const double threshold = std::min(std::nearbyint(a.dropout_p * kSteps), kSteps - 1);
  const void* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(seed.get(), &data));
  return {static_cast<const int64_t*>(data), static_cast<uint32_t>(threshold),
          static_cast<float>(kSteps / (kSteps - threshold))};
}

void check_window(const char* op, const char* name, int64_t keys) {
  INLAY_CHECK(keys >= kUnlimited, op, ": ", name, " must be -1 (no limit) or from 0, got ", keys);
}

void set_sequences(Inputs& inputs, const TensorInfo& q, const TensorInfo& k, const Arguments& a) {
  inputs.queries = sequences_of(q.op, a.cu_seqlens_q, q, "cu_seqlens_q");
  inputs.keys = sequences_of(q.op, a.cu_seqlens_k, k, "cu_seqlens_k");
  INLAY_CHECK(a.cu_seqlens_q.has_value() == a.cu_seqlens_k.has_value(), q.op,
              ": cu_seqlens_q and cu_seqlens_k must be given together");
  INLAY_CHECK(inputs.queries.count == inputs.keys.count, q.op, ": cu_seqlens_k must have as many sequences as ",
              "cu_seqlens_q, ", inputs.queries.count, ", got ", inputs.keys.count);
  if (a.cu_seqlens_q) {
    INLAY_CHECK(!a.mask && !a.bias && !a.kv_lengths, q.op, ": ",
                a.mask   ? "mask"
                : a.bias ? "bias"
                         : "kv_lengths",
                " must be None with cu_seqlens_q, got a tensor");
  }
  if (!a.kv_lengths) return;
  inputs.kv_lengths = index_tensor(q.op, "kv_lengths", *a.kv_lengths, q);
  INLAY_CHECK(inputs.kv_lengths.size == inputs.batch, q.op, ": kv_lengths must have shape [", inputs.batch, "], got ",
              inputs.kv_lengths.size, " elements");
}

}  // namespace

Inputs checked_inputs(const TensorInfo& q, const Arguments& a) {
  const char* op = q.op;
  const TensorInfo k(op, "k", a.k), v(op, "v", a.v);
  INLAY_CHECK(q.dim == 4, op, ": q must have shape [B, Sq, Hq, D], got ", q.shape());
  INLAY_CHECK(k.dim == 4 && k.sizes[0] == q.sizes[0] && k.width() == q.width(), op,
              ": k must have shape [B, Sk, Hkv, D] with q's B and D ", q.shape(), ", got ", k.shape());
  INLAY_CHECK(v.dim == 4 && std::equal(v.sizes, v.sizes + 3, k.sizes), op,
              ": v must have shape [B, Sk, Hkv, DV] with k's B, Sk and Hkv ", k.shape(), ", got ", v.shape());
  Inputs inputs;
  inputs.batch = q.sizes[0];
  inputs.query_heads = q.sizes[2];
  inputs.key_heads = k.sizes[2];
  inputs.head_dim = q.width();
  inputs.value_dim = v.width();
  INLAY_CHECK(inputs.query_heads == inputs.key_heads ||
                  (inputs.key_heads > 0 && inputs.query_heads > 0 && inputs.query_heads % inputs.key_heads == 0),
              op, ": q must have a multiple of k's heads ", inputs.key_heads, ", got ", inputs.query_heads);
  for (const TensorInfo* tensor : {&q, &v}) check_head_dim(*tensor);
  for (const TensorInfo* tensor : {&k, &v}) {
    check_dtype(*tensor, q.dtype, q.dtype);
    check_same_device(*tensor, q);
  }
  inputs.q = token_tensor(q);
  inputs.k = token_tensor(k);
  inputs.v = token_tensor(v);
  set_sequences(inputs, q, k, a);
  if (a.gate) {
    const TensorInfo gate(op, "gate", *a.gate);
    check_shape(gate, {q.sizes[0], q.sizes[1], q.sizes[2], v.width()}, "B, Sq, Hq, DV");
    check_dtype(gate, q.dtype, q.dtype);
    check_same_device(gate, q);
    inputs.gate = token_tensor(gate);
  }
  if (a.sinks) inputs.sinks = sink_tensor({op, "sinks", *a.sinks}, q);
  if (a.bias) {
    const TensorInfo bias(op, "bias", *a.bias);
    check_dtype(bias, q.dtype, wide_dtype(q.dtype));
    inputs.bias = score_tensor("bias", *a.bias, q, inputs);
    inputs.bias.dtype = bias.dtype;
  }
  if (a.mask) {
    INLAY_CHECK(a.mask->scalar_type() == ScalarType::Bool, op, ": mask must be bool, got scalar type ",
                static_cast<int>(a.mask->scalar_type()));
    inputs.mask = score_tensor("mask", *a.mask, q, inputs);
  }
  if (a.key_ranges) inputs.key_ranges = key_ranges_of(*a.key_ranges, q);
  inputs.dropout = dropout_of(a, q);
  INLAY_CHECK(a.softcap >= 0 && std::isfinite(a.softcap), op, ": softcap must be finite and at least 0, got ",
              std::to_string(a.softcap));
  check_window(op, "window_left", a.window_left);
  check_window(op, "window_right", a.window_right);
  inputs.scale = a.scale;
  inputs.softcap = a.softcap;
  inputs.window_left = a.window_left;
  inputs.window_right = a.window_right;
  inputs.allow_tf32 = a.allow_tf32;
  return inputs;
}

Tensor empty_if(bool wanted, const int64_t* sizes, int64_t dim, DType dtype, const TensorInfo& reference) {
  const int64_t none = 0;
  return wanted ? empty(sizes, dim, dtype, reference) : empty(&none, 1, dtype, reference);
}

}  // namespace inlay::attention
