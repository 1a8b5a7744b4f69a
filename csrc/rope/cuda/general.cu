#include "rope/cuda/general.cuh"

#include "rope/cuda/launch.h"

namespace inlay::rope::cuda {

Launch<ForwardParams> general_forward(const ForwardParams& params) {
  const int64_t rows = params.batch * params.tokens * (params.q.heads + params.k.heads);
  constexpr int64_t kRowsPerBlock = kGeneralThreads / kWarp;
  return resident_launch<forward_general_kernel, kGeneralThreads, 0, ForwardParams>((rows + kRowsPerBlock - 1) /
                                                                                    kRowsPerBlock);
}

BackwardLaunch general_backward(const BackwardParams& params) {
  return backward_launch<backward_general_kernel, kWarp, 0>(
      params, params.batch * params.tokens * (params.q.heads + params.k.heads), 1);
}

}  // namespace inlay::rope::cuda
