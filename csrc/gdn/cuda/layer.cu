// Starts the kernel of gdn/layer.h.
#include "gdn/cuda/aligned.h"
#include "gdn/cuda/layer.cuh"

#include "gdn/cuda/recurrent.h"

namespace inlay::gdn {
namespace cuda {
namespace {

constexpr int64_t kMaxCluster = 8;  // blocks: what every GPU with clusters has

template <typename T, int kRows, bool kEvery>
void launch(const LayerStepParams& p, void* stream) {
  constexpr auto kKernel = layer_step_kernel<T, kRows, kEvery>;
  constexpr int kSharedBytes = sizeof(LayerShared<kRows>);
  const bool has_clusters = kernel_traits<kKernel>(kLayerThreads, kSharedBytes).dependent_launch;
  const int64_t blocks = !has_clusters ? 1 : p.group() < kMaxCluster ? p.group() : kMaxCluster;
  // Each state of `states_out` has K V elements, a multiple of 64.
  const bool aligned = aligned_state(p.state) && aligned_pointer(p.states_out.data);
  LayerKernelParams params{p, static_cast<int>(blocks), aligned, 0};
  for (; params.first_sequence < p.conv.batch; params.first_sequence += kMaxGridSequences) {
    const int64_t left = p.conv.batch - params.first_sequence;
    const int64_t count = left < kMaxGridSequences ? left : kMaxGridSequences;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(p.key_heads), static_cast<unsigned>(count));
    start<kKernel, kLayerThreads, kSharedBytes>(params, grid, stream, static_cast<int>(blocks));
  }
}

template <typename T, int kRows>
void launch(const LayerStepParams& p, void* stream) {
  p.states_out.data ? launch<T, kRows, true>(p, stream) : launch<T, kRows, false>(p, stream);
}

template <typename T>
void launch(const LayerStepParams& p, void* stream) {
  p.key_dim > kGroups * 8 ? launch<T, 16>(p, stream) : launch<T, 8>(p, stream);
}

}  // namespace
}  // namespace cuda

void layer_step(const LayerStepParams& params, void* stream) {
  switch (params.conv.dtype) {
    case DType::bf16:
      return cuda::launch<__nv_bfloat16>(params, stream);
    case DType::f16:
      return cuda::launch<__half>(params, stream);
    case DType::f32:
      return cuda::launch<float>(params, stream);
    default:
      inlay::cuda::fail("inlay: mixed_qkv must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

}  // namespace inlay::gdn
