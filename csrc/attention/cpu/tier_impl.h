// The table of one tier's kernels, over its vector type.
#pragma once

#include "attention/cpu/backward_impl.h"
#include "attention/cpu/bias_impl.h"
#include "attention/cpu/forward_impl.h"

namespace inlay::attention {
namespace {

template <class Vec>
void run_forward(const ForwardParams& p, const QueryTask& task, void* memory) {
  Forward<Vec>(p, memory).run(task);
}

template <class Vec>
void run_backward(const BackwardParams& p, const BackwardScratch& scratch, const KeyTask& task, void* memory) {
  Backward<Vec>(p, scratch, memory).run(task);
}

template <class Vec>
void bias_gradient(const BackwardParams& p, const BackwardScratch& scratch, const BiasTask& task, void* memory) {
  BiasGradient<Vec>(p, scratch, memory).run(task);
}

template <class Vec>
int64_t forward_bytes(const Inputs& inputs) {
  return Forward<Vec>::bytes(inputs);
}

template <class Vec>
int64_t backward_bytes(const Inputs& inputs) {
  return larger(Backward<Vec>::elements(inputs), BiasGradient<Vec>::elements(inputs)) *
         static_cast<int64_t>(sizeof(typename Vec::Scalar));
}

template <class Vec>
constexpr Kernels kernels_of() {
  return {run_forward<Vec>,   prepare<Vec>,       run_backward<Vec>,  store_dq<Vec>,
          bias_gradient<Vec>, sink_gradient<Vec>, forward_bytes<Vec>, backward_bytes<Vec>};
}

}  // namespace
}  // namespace inlay::attention
