// The kernels of one instruction set, for the tier files.
#pragma once

#include "rope/cpu/backward_impl.h"
#include "rope/cpu/forward_impl.h"

namespace inlay::rope {
namespace {

template <class Vec>
constexpr Kernels kernels_of() {
  return {forward<Vec>, backward<Vec>, sum_partials<Vec>};
}

}  // namespace
}  // namespace inlay::rope
