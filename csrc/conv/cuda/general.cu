#include "conv/cuda/general.cuh"

#include "conv/cuda/launch.h"

namespace inlay::conv::cuda {

Plan<ForwardParams> general_forward(const ForwardParams& params) {
  Plan<ForwardParams> plan;
  plan.blocks = ceil_div(params.batch * params.time * params.channels, kThreads);
  plan.start = start_blocks<general_forward_kernel, ForwardParams>;
  return plan;
}

Plan<BackwardParams> general_backward(const BackwardParams& params) {
  // Every token is a tile, and a group is as many of them as give a grid that fills the chip once.
  const auto plan_of = [&](auto share) {
    constexpr int kShare = decltype(share)::value;
    auto plan = make_plan<general_backward_kernel<kShare>>(params, params.channels * kShare, 1, kBackwardWaves);
    const int64_t groups = plan.tiling.groups;
    plan.tiling = tiling(1, params.batch * params.time, 1, params.batch * params.time);
    if (groups > 0) {
      plan.tiling.tiles_per_group = ceil_div(plan.tiling.all_tiles, groups);
      plan.tiling.groups = ceil_div(plan.tiling.all_tiles, plan.tiling.tiles_per_group);
    }
    plan.blocks = ceil_div(plan.tiling.groups * params.channels * kShare, kThreads);
    return plan;
  };
  return params.time_contiguous ? plan_of(std::integral_constant<int, kWarp>{})
                                : plan_of(std::integral_constant<int, 1>{});
}

void final_state(const ForwardParams& params, void* stream) {
  start_threads<final_state_kernel>(params, params.sequences.count * params.channels, stream);
}

void initial_state_gradient(const BackwardParams& params, void* stream) {
  start_threads<initial_state_gradient_kernel>(params, params.sequences.count * params.channels, stream);
}

}  // namespace inlay::conv::cuda
