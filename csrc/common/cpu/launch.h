// What the launch.cpp of every family does: chooses the kernels for this machine, and how finely to share work out.
// Not for the tiers' own sources: what is inline here would be compiled for their instruction sets.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"

// A family's tables of kernels, as its kernels.h declares them, one for each instruction set that there are sources
// for.
#ifdef __x86_64__
#define INLAY_TIERS kGenericKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels
#else
#define INLAY_TIERS kGenericKernels
#endif

namespace inlay::cpu {

// The one for this machine, or the best there is: few families have kernels for AMX.
template <class Kernels, class... Better>
const Kernels& tier_in_use(const Kernels& generic, const Better&... better) {
  const Kernels* const tiers[] = {&generic, &better...};
  constexpr int kBest = sizeof...(better);
  const int wanted = static_cast<int>(isa_in_use());
  return *tiers[wanted < kBest ? wanted : kBest];
}

// Pieces of so many elements each that a thread is to take at least: fewer are not worth waking a second one.
inline int64_t grain(int64_t elements) {
  constexpr int64_t kElementsPerThread = 32768;
  const int64_t pieces = kElementsPerThread / (elements > 1 ? elements : 1);
  return pieces > 1 ? pieces : 1;
}

}  // namespace inlay::cpu
