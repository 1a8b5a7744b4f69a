// The table of one tier's kernels, over its vector type.
#pragma once

#include "moe/cpu/backward_impl.h"
#include "moe/cpu/router_impl.h"

namespace inlay::moe {
namespace {

template <class Vec>
void up(const ExpertForwardParams& p, void* activations, const UpTask& task, void* memory) {
  Up<Vec>(p, activations, memory).run(task);
}

template <class Vec>
void combine(const Combination& p, const CombineTask& task, void* memory) {
  Combine<Vec>(p, memory).run(task);
}

template <class Vec>
void activation_gradient(const ExpertBackwardParams& p, const BackwardScratch& scratch, const UpTask& task,
                         void* memory) {
  ActivationGradient<Vec>(p, scratch, memory).run(task);
}

template <class Vec>
void outer(const OuterProducts& p, const OuterTask& task, void* memory) {
  Outer<Vec>(p, memory).run(task);
}

template <class Vec>
int64_t expert_bytes(const ExpertInputs& in) {
  using Scalar = typename Vec::Scalar;
  const int64_t widest = larger(in.hidden, in.pre_activations());
  const int64_t kernels = larger(larger(Up<Vec>::elements(in), Combine<Vec>::elements(widest)),
                                 larger(ActivationGradient<Vec>::elements(in), Outer<Vec>::elements()));
  return larger(kernels, MatrixArena<Scalar>::elements(2, widest)) * static_cast<int64_t>(sizeof(Scalar));
}

template <class Vec>
constexpr Kernels kernels_of() {
  return {route<Vec>,
          route_backward<Vec>,
          mean_of_groups<Vec>,
          up<Vec>,
          combine<Vec>,
          activation_gradient<Vec>,
          outer<Vec>,
          sum_rows<Vec>,
          weight_gradients<Vec>,
          shared_gradients<Vec>,
          router_bytes<Vec>,
          expert_bytes<Vec>};
}

}  // namespace
}  // namespace inlay::moe
