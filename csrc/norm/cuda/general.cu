#include "norm/cuda/general.cuh"
#include "norm/cuda/launch.h"

namespace inlay::norm::cuda {
namespace {

// Rows of up to this many elements are served by a warp each, wider ones by a block.
constexpr int64_t kWarpWidth = 2048;
// Elements in a wide access: 16 bytes of a 16-bit dtype, two accesses of a float32 tensor beside it.
constexpr int kWideLanes = 8;

template <auto Kernel, int kGroup, typename Params>
Launch<Params> launch_of(const Params& params) {
  constexpr int kRowsPerBlock = kGeneralThreads / kGroup;
  return resident_launch<Kernel, kGeneralThreads, 0, Params>((params.rows + kRowsPerBlock - 1) / kRowsPerBlock);
}

}  // namespace

Launch<ForwardParams> general_forward(const ForwardParams& params, bool wide) {
  if (params.width <= kWarpWidth) {
    return wide ? launch_of<forward_general_kernel<kWideLanes, 32>, 32>(params)
                : launch_of<forward_general_kernel<1, 32>, 32>(params);
  }
  return wide ? launch_of<forward_general_kernel<kWideLanes, kGeneralThreads>, kGeneralThreads>(params)
              : launch_of<forward_general_kernel<1, kGeneralThreads>, kGeneralThreads>(params);
}

Launch<BackwardParams> general_backward(const BackwardParams& params, bool wide) {
  if (params.width <= kWarpWidth) {
    return wide ? launch_of<backward_general_kernel<kWideLanes, 32>, 32>(params)
                : launch_of<backward_general_kernel<1, 32>, 32>(params);
  }
  return wide ? launch_of<backward_general_kernel<kWideLanes, kGeneralThreads>, kGeneralThreads>(params)
              : launch_of<backward_general_kernel<1, kGeneralThreads>, kGeneralThreads>(params);
}

}  // namespace inlay::norm::cuda
