// The kernels of one instruction set, for the tier files.
#pragma once

#include "common/cpu/partial_sums.h"
#include "conv/cpu/channels_impl.h"
#include "conv/cpu/states_impl.h"
#include "conv/cpu/tokens_impl.h"

namespace inlay::conv {
namespace {

template <class Vec>
void forward(const ForwardParams& p, int64_t begin, int64_t end, void* scratch, bool stream) {
  if (p.time_contiguous) {
    forward_tokens<Vec>(p, begin, end, scratch);
  } else {
    forward_channels<Vec>(p, begin, end, scratch, stream);
  }
  if (stream) Vec::stream_fence();
}

template <class Vec>
void backward(const BackwardParams& p, int64_t begin, int64_t end, void* scratch, bool stream) {
  if (p.time_contiguous) {
    backward_tokens<Vec>(p, begin, end, scratch);
  } else {
    backward_channels<Vec>(p, begin, end, scratch, stream);
  }
  if (stream) Vec::stream_fence();
}

template <class Vec>
void sum_partials(const BackwardParams& p, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  const Scalar* partials = static_cast<const Scalar*>(p.partials);
  for (int64_t sum = 0; sum < p.sums(); ++sum) {
    const bool is_weight = p.dweight.data && sum < p.width;
    const OutputTensor& output = is_weight ? p.dweight : p.dbias;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kSumBlock;
      const int64_t count = smaller(kSumBlock, p.channels - first);
      Scalar totals[kSumBlock];
      add_groups(partials + sum * p.channels + first, p.partial_rows, p.sums() * p.channels, count, totals);
      with_element_type<Vec>(output.dtype, [&](auto type) {
        auto* target = static_cast<typename decltype(type)::type*>(output.data);
        if (is_weight) {
          scatter_row<Vec>(totals, count, p.width, target + first * p.width + sum);
        } else {
          scatter_row<Vec>(totals, count, 1, target + first);
        }
      });
    }
  }
}

template <class Vec>
constexpr Kernels kernels_of() {
  return {forward<Vec>, backward<Vec>, sum_partials<Vec>, initial_state_gradient<Vec>, step<Vec>};
}

}  // namespace
}  // namespace inlay::conv
