// Picks the backward kernel of a row of the shape table; instantiated per dtype in instantiations/.
#pragma once

#include "rope/cuda/backward.cuh"
#include "rope/cuda/launch.h"

namespace inlay::rope::cuda {

template <typename T, typename C, bool kNorm, bool kInterleaved, int kIndex>
BackwardLaunch backward_launch(const BackwardParams& params) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  const int64_t warps =
      params.batch * params.tokens * (kShape.warps_for(params.q.heads) + kShape.warps_for(params.k.heads));
  return backward_launch<backward_kernel<T, C, kNorm, kInterleaved, kIndex>, kShape.threads,
                         sizeof(BackwardBuffer<kNorm, kIndex>)>(params, (warps + kShape.warps() - 1) / kShape.warps(),
                                                                32 / kShape.group);
}

template <typename T, typename C, bool kNorm, bool kInterleaved, int... kIndices>
BackwardLaunch backward_launch(const BackwardParams& params, int shape, std::integer_sequence<int, kIndices...>) {
  using Find = BackwardLaunch (*)(const BackwardParams&);
  static constexpr Find kFind[] = {backward_launch<T, C, kNorm, kInterleaved, kIndices>...};
  return kFind[shape](params);
}

template <typename T, typename C>
BackwardLaunch register_backward(const BackwardParams& params, int shape) {
  constexpr auto kIndices = inlay::cuda::row_numbers(kBackwardShapes);
  if (params.normalises) {
    return params.interleaved ? backward_launch<T, C, true, true>(params, shape, kIndices)
                              : backward_launch<T, C, true, false>(params, shape, kIndices);
  }
  return params.interleaved ? backward_launch<T, C, false, true>(params, shape, kIndices)
                            : backward_launch<T, C, false, false>(params, shape, kIndices);
}

}  // namespace inlay::rope::cuda
