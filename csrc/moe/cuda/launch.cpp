// The CUDA side of moe/params.h: the experts. The router is in router.cu and router_backward.cu.
#include <stdexcept>

#include "common/cuda/runtime.h"
#include "moe/cuda/scratch.h"

namespace inlay::moe {
namespace cuda {
namespace {

// What python/inlay/ops/_moe_kernels.py should have kept away.
void check_served(const ExpertInputs& in) {
  if (in.x.dtype == DType::f64) throw std::runtime_error("moe_experts: x must not be float64 on CUDA");
}

void forward_products(const ForwardSteps& steps, void* stream) {
  if (fits_tiles(steps.inputs, nullptr)) return tiled_forward_products(steps, stream);
  general_forward_products(steps, stream);
}

void clear(const OutputTensor& out, int64_t elements, void* stream) {
  if (!out.data) return;
  inlay::cuda::check(cudaMemsetAsync(out.data, 0, static_cast<std::size_t>(elements * size_of(out.dtype)),
                                     static_cast<cudaStream_t>(stream)),
                     "cudaMemsetAsync");
}

int64_t part_width(const ExpertBackwardParams& p) {
  return fits_tiles(p.inputs, &p.dy) ? tiled_part_width() : general_part_width();
}

}  // namespace
}  // namespace cuda

int64_t scratch_bytes(const ExpertForwardParams& params) {
  cuda::check_served(params.inputs);
  if (cuda::fits_few(params)) return cuda::few_scratch_bytes(params);
  return cuda::ForwardScratch(params, nullptr).bytes;
}

void forward(const ExpertForwardParams& params, void* stream) {
  if (cuda::fits_few(params)) return cuda::forward_few(params, stream);
  const cuda::ForwardScratch scratch(params, params.scratch);
  cuda::find_rows(params, scratch.steps.padded, scratch.find_rows, stream);
  if (params.inputs.most_rows() > 0) cuda::forward_products(scratch.steps, stream);
  cuda::combine(params, scratch.steps.padded, scratch.steps.results, stream);
}

int64_t scratch_bytes(const ExpertBackwardParams& params) {
  cuda::check_served(params.inputs);
  return cuda::BackwardScratch(params, cuda::part_width(params), nullptr).bytes;
}

void backward(const ExpertBackwardParams& params, void* stream) {
  const ExpertInputs& in = params.inputs;
  const cuda::BackwardScratch scratch(params, cuda::part_width(params), params.scratch);
  const cuda::BackwardSteps& steps = scratch.steps;
  cuda::pad_rows(in, params.rows, steps.padded, stream);
  if (in.most_rows() > 0) {
    if (scratch.h) {
      cuda::ForwardSteps again;
      again.inputs = in;
      again.rows = params.rows;
      again.padded = steps.padded;
      again.h = scratch.h;
      cuda::forward_products(again, stream);
    }
    if (cuda::fits_tiles(in, &params.dy)) {
      cuda::tiled_backward_products(steps, stream);
    } else {
      cuda::general_backward_products(steps, stream);
    }
  } else {
    const int64_t matrix = in.experts * in.hidden * in.intermediate;
    cuda::clear(params.dgate_up_proj, in.gating.gated ? 2 * matrix : matrix, stream);
    cuda::clear(params.ddown_proj, matrix, stream);
  }
  cuda::bias_gradients(params, steps, scratch.bias_gradients, stream);
  cuda::combine_gradients(params, steps, stream);
}

}  // namespace inlay::moe
