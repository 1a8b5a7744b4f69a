// What the norm kernels of one instruction set offer; launch.cpp chooses among these tables.
#pragma once

#include "norm/params.h"

namespace inlay::norm {

struct Kernels {
  // Rows [begin, end). `scratch` holds kForwardScratch rows of x's width, in float32 (float64 for float64 x).
  // `stream`: the outputs are too large for the caches.
  void (*forward)(const ForwardParams& params, int64_t begin, int64_t end, void* scratch, bool stream);
  // Groups of rows [begin, end) out of `groups`, each with its own sums in params.partials if these are wanted.
  // `scratch`: kBackwardScratch rows.
  void (*backward)(const BackwardParams& params, int64_t begin, int64_t end, int64_t groups, void* scratch,
                   bool stream);
  // dweight and dbias from the groups' sums: blocks [begin, end) of cpu::kSumBlock columns.
  void (*sum_partials)(const BackwardParams& params, int64_t begin, int64_t end);
};

constexpr int64_t kForwardScratch = 3;   // weight, bias, the row that is normalised
constexpr int64_t kBackwardScratch = 3;  // weight, bias, sigmoid(gate)

extern const Kernels kGenericKernels;
extern const Kernels kGenericF64Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace inlay::norm
