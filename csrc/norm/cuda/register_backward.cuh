// Picks the backward kernel of a row of the shape table; instantiated per role and dtype in instantiations/.
#pragma once

#include "norm/cuda/backward.cuh"
#include "norm/cuda/launch.h"

namespace inlay::norm::cuda {

template <typename T, Role kRole, bool kBias, int kIndex>
Launch<BackwardParams> backward_launch(const BackwardParams& params) {
  constexpr Shape kShape = kBackwardShapes[kIndex];
  return resident_launch<backward_kernel<T, kRole, kBias, kIndex>, kShape.threads,
                         sizeof(BackwardBuffer<kRole, kIndex>), BackwardParams>((params.rows + kShape.groups() - 1) /
                                                                                kShape.groups());
}

template <typename T, Role kRole, bool kBias, int... kIndices>
Launch<BackwardParams> backward_launch(const BackwardParams& params, int shape,
                                       std::integer_sequence<int, kIndices...>) {
  using Find = Launch<BackwardParams> (*)(const BackwardParams&);
  static constexpr Find kFind[] = {backward_launch<T, kRole, kBias, kIndices>...};
  return kFind[shape](params);
}

template <typename T, Role kRole>
Launch<BackwardParams> register_backward(const BackwardParams& params, int shape) {
  constexpr auto kIndices = inlay::cuda::row_numbers(kBackwardShapes);
  if constexpr (kRole == Role::plain) {  // the only role whose kernels sum a bias's gradient
    if (params.dbias.data) return backward_launch<T, kRole, true>(params, shape, kIndices);
  }
  return backward_launch<T, kRole, false>(params, shape, kIndices);
}

}  // namespace inlay::norm::cuda
