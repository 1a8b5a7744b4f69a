// Which kernel serves which parameters. Instantiated in instantiations/, general.cu and step.cu.
#pragma once

#include "common/cuda/launch.cuh"
#include "conv/cuda/config.h"
#include "conv/params.h"

namespace inlay::conv::cuda {

template <class Params>
struct Work {
  Params params;
  Tiling tiling;
};

// A kernel made ready for some parameters. The tiling is part of it, for it decides how many groups of tokens have
// sums of their own.
template <class Params>
struct Plan {
  Tiling tiling;
  int64_t blocks = 0;
  void (*start)(const Work<Params>& work, int64_t blocks, void* stream) = nullptr;

  void run(const Params& params, void* stream) const {
    if (blocks > 0) start({params, tiling}, blocks, stream);
  }
};

template <auto Kernel, class Params>
void start_blocks(const Work<Params>& work, int64_t blocks, void* stream) {
  inlay::cuda::start<Kernel, kThreads>(work, dim3(static_cast<unsigned>(blocks)), stream);
}

// A kernel without a tiling, a piece of work a thread.
template <auto Kernel, class Params>
void start_threads(const Params& params, int64_t threads, void* stream) {
  if (threads == 0) return;
  inlay::cuda::start<Kernel, kThreads>(params, dim3(static_cast<unsigned>(ceil_div(threads, kThreads))), stream);
}

// `shares`: threads that work on one group of tokens; a group has at least `unit` of them.
template <auto Kernel, class Params>
Plan<Params> make_plan(const Params& params, int64_t shares, int64_t unit, int64_t waves) {
  const int64_t resident = static_cast<int64_t>(inlay::cuda::multiprocessor_count()) * kThreads *
                           inlay::cuda::kernel_traits<Kernel>(kThreads, 0).resident_blocks;
  Plan<Params> plan;
  plan.tiling = tiling(params.batch, params.time, unit, waves * resident / shares);
  plan.blocks = ceil_div(plan.tiling.groups * shares, kThreads);
  plan.start = start_blocks<Kernel, Params>;
  return plan;
}

// 16-byte accesses, channels or tokens innermost; the width is one of those that have kernels.
template <typename T>
Plan<ForwardParams> channels_forward(const ForwardParams& params);
template <typename T>
Plan<ForwardParams> tokens_forward(const ForwardParams& params);
template <typename T>
Plan<BackwardParams> channels_backward(const BackwardParams& params);
template <typename T>
Plan<BackwardParams> tokens_backward(const BackwardParams& params);

// Everything else.
Plan<ForwardParams> general_forward(const ForwardParams& params);
Plan<BackwardParams> general_backward(const BackwardParams& params);
void final_state(const ForwardParams& params, void* stream);
void initial_state_gradient(const BackwardParams& params, void* stream);
void single_steps(const StepParams& params, void* stream);

// Picks the plan of the kernel for params.width among `Make<2>` to `Make<4>`.
template <template <int> class Make, class Params>
auto plan_for_width(const Params& params) {
  switch (params.width) {
    case 2:
      return Make<2>::plan(params);
    case 3:
      return Make<3>::plan(params);
    default:
      return Make<4>::plan(params);
  }
}

}  // namespace inlay::conv::cuda
