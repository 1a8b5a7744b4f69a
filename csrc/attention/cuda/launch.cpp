// The CUDA side of attention/params.h.
#include "attention/cuda/launch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

#include "attention/cuda/backward_rows.h"
#include "attention/cuda/general.h"
#include "attention/cuda/scratch.h"
#include "common/cuda/runtime.h"

namespace inlay::attention {
namespace cuda {
namespace {

using namespace inlay::cuda;

bool fits(const ForwardShape& shape, const Inputs& in) {
  const int64_t sequences = in.queries.count > 0 ? in.queries.count : 1;
  const int64_t queries = in.queries.offsets ? in.queries.tokens / sequences : in.queries.tokens;
  return in.head_dim <= shape.head_dim && in.value_dim <= shape.value_dim && queries <= shape.most_queries;
}

// Whether the Hopper tiles serve a case; the general kernels serve the others.
bool has_tiles(const Inputs& in) {
  if (!is_hopper() || (in.q.dtype != DType::bf16 && in.q.dtype != DType::f16)) return false;
  if (in.mask.data || in.bias.data || in.dropout.seed) return false;
  return std::any_of(std::begin(kForwardShapes), std::end(kForwardShapes),
                     [&](const ForwardShape& shape) { return fits(shape, in); });
}

// What python/inlay/ops/_attention_kernels.py should have kept away.
void check_served(const Inputs& in) {
  if (in.q.dtype == DType::f64) throw std::runtime_error("attention: q must not be float64 on CUDA");
}

template <typename T, std::size_t... kShapes>
void start_forward(const ForwardParams& params, void* stream, std::index_sequence<kShapes...>) {
  const auto use = [&](auto shape) {
    if (!fits(kForwardShapes[shape], params.inputs)) return false;
    forward_tiles<T, static_cast<int>(shape)>(params, stream);
    return true;
  };
  (use(std::integral_constant<std::size_t, kShapes>()) || ...);
}

const BackwardShape& backward_shape_for(const Inputs& in) {
  for (const BackwardShape& shape : kBackwardShapes) {
    const bool fits = in.head_dim <= shape.head_dim && in.value_dim <= shape.value_dim;
    if (fits && shape.capped == (in.softcap > 0)) return shape;
  }
  throw std::runtime_error("attention_bwd: q and v are too wide for CUDA");
}

template <typename T, std::size_t... kShapes>
void start_backward(const BackwardParams& params, const BackwardShape& use, const BackwardScratch& scratch,
                    void* stream, std::index_sequence<kShapes...>) {
  const auto start = [&](auto shape) {
    if (&kBackwardShapes[shape] == &use) backward_tiles<T, static_cast<int>(shape)>(params, scratch, stream);
  };
  (start(std::integral_constant<std::size_t, kShapes>()), ...);
}

}  // namespace
}  // namespace cuda

int64_t scratch_bytes(const ForwardParams& params) {
  cuda::check_served(params.inputs);
  if (!cuda::has_tiles(params.inputs)) return cuda::general_scratch_bytes(params);
  return cuda::ForwardScratch(params.inputs, nullptr).bytes;
}

void forward(const ForwardParams& params, void* stream) {
  using cuda::boxed;
  if (!cuda::has_tiles(params.inputs)) return cuda::general_forward(params, stream);
  ForwardParams own = params;
  Inputs& in = own.inputs;
  const cuda::ForwardScratch scratch(in, params.scratch);
  own.scratch = scratch.taken;
  if (scratch.q) in.q = cuda::dense_copy(boxed(in.q, in, true, in.head_dim), scratch.q, stream);
  if (scratch.k) in.k = cuda::dense_copy(boxed(in.k, in, false, in.head_dim), scratch.k, stream);
  if (scratch.v) in.v = cuda::dense_copy(boxed(in.v, in, false, in.value_dim), scratch.v, stream);
  constexpr auto kShapes = std::make_index_sequence<std::size(cuda::kForwardShapes)>();
  if (in.q.dtype == DType::bf16) {
    cuda::start_forward<__nv_bfloat16>(own, stream, kShapes);
  } else {
    cuda::start_forward<__half>(own, stream, kShapes);
  }
}

int64_t scratch_bytes(const BackwardParams& params) {
  cuda::check_served(params.inputs);
  if (!cuda::has_tiles(params.inputs)) return cuda::general_scratch_bytes(params);
  return cuda::BackwardScratch(params, cuda::backward_shape_for(params.inputs), nullptr).bytes;
}

void backward(const BackwardParams& params, void* stream) {
  using cuda::boxed;
  if (!cuda::has_tiles(params.inputs)) return cuda::general_backward(params, stream);
  BackwardParams own = params;
  Inputs& in = own.inputs;
  const cuda::BackwardShape& shape = cuda::backward_shape_for(in);
  const cuda::BackwardScratch scratch(own, shape, params.scratch);
  const auto clear = [&](const OutputTensor& out, int64_t elements) {
    inlay::cuda::check(cudaMemsetAsync(out.data, 0, elements * 2, static_cast<cudaStream_t>(stream)),
                       "cudaMemsetAsync");
  };
  const bool queries = in.batch * in.queries.tokens * in.query_heads > 0, keys = in.keys.tokens * in.key_heads > 0;
  if (!queries) {
    clear(own.dk, in.batch * in.keys.tokens * in.key_heads * in.head_dim);
    clear(own.dv, in.batch * in.keys.tokens * in.key_heads * in.value_dim);
    if (in.sinks.data) {
      inlay::cuda::check(cudaMemsetAsync(own.dsinks.data, 0, in.query_heads * size_of(own.dsinks.dtype),
                                         static_cast<cudaStream_t>(stream)),
                         "cudaMemsetAsync");
    }
    return;
  }
  if (scratch.q) in.q = cuda::dense_copy(boxed(in.q, in, true, in.head_dim), scratch.q, stream);
  if (scratch.k) in.k = cuda::dense_copy(boxed(in.k, in, false, in.head_dim), scratch.k, stream);
  if (scratch.v) in.v = cuda::dense_copy(boxed(in.v, in, false, in.value_dim), scratch.v, stream);
  if (scratch.dout && !in.gate.data) {
    own.dout = cuda::dense_copy(boxed(own.dout, in, true, in.value_dim), scratch.dout, stream);
  }
  cuda::prepare_rows(own, scratch, stream);
  if (in.gate.data) {
    own.dout = {scratch.dout, in.q.dtype, in.queries.tokens * in.query_heads * in.value_dim,
                in.query_heads * in.value_dim, in.value_dim};
  }
  constexpr auto kShapes = std::make_index_sequence<std::size(cuda::kBackwardShapes)>();
  if (keys && in.q.dtype == DType::bf16) cuda::start_backward<__nv_bfloat16>(own, shape, scratch, stream, kShapes);
  if (keys && in.q.dtype == DType::f16) cuda::start_backward<__half>(own, shape, scratch, stream, kShapes);
  cuda::finish_rows(own, shape, scratch, stream);
}

}  // namespace inlay::attention
