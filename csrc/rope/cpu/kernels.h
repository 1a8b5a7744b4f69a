// What the rope kernels of one instruction set offer; launch.cpp chooses among these tables.
#pragma once

#include "rope/params.h"

namespace inlay::rope {

struct Kernels {
  // Tokens [begin, end) of all batch rows' tokens, one after another. `scratch` holds kForwardScratch rows of the
  // heads' width, in float32 (float64 for float64 q). `stream`: the outputs are too large for the caches.
  void (*forward)(const ForwardParams& params, int64_t begin, int64_t end, void* scratch, bool stream);
  // Groups of tokens [begin, end) out of `groups`, each with its own sums in the sides' partials if these are wanted.
  // `scratch`: kBackwardScratch rows.
  void (*backward)(const BackwardParams& params, int64_t begin, int64_t end, int64_t groups, void* scratch,
                   bool stream);
  // dweight from the groups' sums: blocks [begin, end) of cpu::kSumBlock columns.
  void (*sum_partials)(const BackwardSide& side, int64_t width, int64_t begin, int64_t end);
};

constexpr int64_t kForwardScratch = 4;   // cos, sin, the weights of q and k
constexpr int64_t kBackwardScratch = 5;  // the same, and the gradient of what is rotated

extern const Kernels kGenericKernels;
extern const Kernels kGenericF64Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace inlay::rope
