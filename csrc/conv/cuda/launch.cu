// The CUDA side of conv/params.h: chooses kernels and starts them.
#include <initializer_list>

#include "conv/cuda/launch.h"
#include "conv/cuda/sum_partials.cuh"

namespace inlay::conv {
namespace cuda {
namespace {

void require_supported(DType dtype) {
  if (dtype == DType::f64) {
    inlay::cuda::fail("inlay: x must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Whether every run of neighbours in memory starts at a multiple of 16 bytes and is as long.
template <class Data>
bool aligned(const Convolution& p, const Signal<Data>& signal) {
  const int64_t elements = 16 / size_of(p.dtype);
  const int64_t length = p.time_contiguous ? p.time : p.channels;
  const int64_t pitch = p.time_contiguous ? signal.channel_stride : signal.time_stride;
  return aligned(signal.data) && length % elements == 0 && pitch % elements == 0 && signal.batch_stride % elements == 0;
}

bool has_fast_kernel(const Convolution& p) {
  // The fast kernels number tiles and threads, at most one for 16 bytes, in 32 bits.
  const int64_t vectors = p.batch * p.time * p.channels / (16 / size_of(p.dtype));
  const bool countable = p.batch * p.time <= UINT32_MAX && vectors <= UINT32_MAX - kThreads;
  return countable && p.width >= kMinFastWidth && p.width <= kMaxFastWidth && aligned(p, p.x) &&
         aligned(p.weight.data) && aligned(p.bias.data);
}

// Calls `use` with a value of the dtype's element type.
template <class Use>
auto with_type(DType dtype, Use use) {
  switch (dtype) {
    case DType::bf16:
      return use(__nv_bfloat16{});
    case DType::f16:
      return use(__half{});
    default:
      return use(float{});
  }
}

Plan<ForwardParams> find_forward(const ForwardParams& p) {
  if (!has_fast_kernel(p) || !aligned(p, p.y)) return general_forward(p);
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.time_contiguous ? tokens_forward<T>(p) : channels_forward<T>(p);
  });
}

Plan<BackwardParams> find_backward(const BackwardParams& p) {
  // dx does not exist yet when the number of partial sums is asked for; it is allocated with x's size and aligned.
  if (!has_fast_kernel(p) || !aligned(p, p.dy)) return general_backward(p);
  return with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.time_contiguous ? tokens_backward<T>(p) : channels_backward<T>(p);
  });
}

}  // namespace
}  // namespace cuda

void forward(const ForwardParams& params, void* stream) {
  cuda::require_supported(params.dtype);
  if (params.time > 0) cuda::find_forward(params).run(params, stream);
  if (params.final_state.data) cuda::final_state(params, stream);
}

int64_t partial_rows(const BackwardParams& params) {
  cuda::require_supported(params.dtype);
  return params.channels > 0 ? cuda::find_backward(params).tiling.groups : 0;
}

void backward(const BackwardParams& params, void* stream) {
  cuda::require_supported(params.dtype);
  cuda::find_backward(params).run(params, stream);
  if (params.dinitial_state.data) cuda::initial_state_gradient(params, stream);
  if (params.sums() == 0) return;
  const int64_t blocks = cuda::ceil_div(params.channels, cuda::kSumColumns);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(params.sums()));
  inlay::cuda::start<cuda::sum_partials_kernel, cuda::kSumColumns * cuda::kSumWarps>(params, grid, stream);
}

void step(const StepParams& params, void* stream) {
  cuda::require_supported(params.dtype);
  cuda::single_steps(params, stream);
}

}  // namespace inlay::conv
