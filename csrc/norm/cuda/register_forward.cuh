// Picks the forward kernel of a row of the shape table; instantiated per role and dtype in instantiations/.
#pragma once

#include "norm/cuda/forward.cuh"
#include "norm/cuda/launch.h"

namespace inlay::norm::cuda {

template <typename T, Role kRole, int kIndex>
Launch<ForwardParams> forward_launch(const ForwardParams& params) {
  constexpr Shape kShape = forward_shapes<kRole>()[kIndex];
  const int64_t blocks = (params.rows + kShape.groups() - 1) / kShape.groups();
  if constexpr (kRole == Role::gated) {
    return resident_launch<forward_kernel<T, kRole, kIndex>, kShape.threads, sizeof(ForwardBuffer<kRole, kIndex>),
                           ForwardParams>(blocks);
  } else {
    return block_per_piece_launch<forward_kernel<T, kRole, kIndex>, kShape.threads, ForwardParams>(blocks);
  }
}

template <typename T, Role kRole, int... kIndices>
Launch<ForwardParams> forward_launch(const ForwardParams& params, int shape, std::integer_sequence<int, kIndices...>) {
  using Find = Launch<ForwardParams> (*)(const ForwardParams&);
  static constexpr Find kFind[] = {forward_launch<T, kRole, kIndices>...};
  return kFind[shape](params);
}

template <typename T, Role kRole>
Launch<ForwardParams> register_forward(const ForwardParams& params, int shape) {
  return forward_launch<T, kRole>(params, shape, inlay::cuda::row_numbers(forward_shapes<kRole>()));
}

}  // namespace inlay::norm::cuda
