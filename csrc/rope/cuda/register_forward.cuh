// Picks the forward kernel of a row of the shape table; instantiated per dtype in instantiations/.
#pragma once

#include "rope/cuda/forward.cuh"
#include "rope/cuda/launch.h"

namespace inlay::rope::cuda {

template <typename T, bool kNorm, bool kInterleaved, Form kForm, int kIndex>
Launch<ForwardParams> forward_launch(const ForwardParams& params) {
  constexpr Shape kShape = kForwardShapes[kIndex];
  const int64_t warps =
      params.batch * params.tokens * (kShape.warps_for(params.q.heads) + kShape.warps_for(params.k.heads));
  return inlay::cuda::block_per_piece_launch<forward_kernel<T, kNorm, kInterleaved, kForm, kIndex>, kShape.threads,
                                             ForwardParams>((warps + kShape.warps() - 1) / kShape.warps());
}

template <typename T, bool kNorm, bool kInterleaved, Form kForm, int... kIndices>
Launch<ForwardParams> forward_launch(const ForwardParams& params, int shape, std::integer_sequence<int, kIndices...>) {
  using Find = Launch<ForwardParams> (*)(const ForwardParams&);
  static constexpr Find kFind[] = {forward_launch<T, kNorm, kInterleaved, kForm, kIndices>...};
  return kFind[shape](params);
}

template <typename T, Form kForm>
Launch<ForwardParams> register_forward(const ForwardParams& params, int shape) {
  constexpr auto kIndices = inlay::cuda::row_numbers(kForwardShapes);
  if constexpr (kForm != Form::stepwise) {  // which has weights
    if (!params.normalises) {
      return params.interleaved ? forward_launch<T, false, true, kForm>(params, shape, kIndices)
                                : forward_launch<T, false, false, kForm>(params, shape, kIndices);
    }
  }
  return params.interleaved ? forward_launch<T, true, true, kForm>(params, shape, kIndices)
                            : forward_launch<T, true, false, kForm>(params, shape, kIndices);
}

}  // namespace inlay::rope::cuda
