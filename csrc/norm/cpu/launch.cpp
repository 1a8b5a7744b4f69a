// Chooses the kernels for this machine and splits the rows over torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu/launch.h"
#include "common/cpu/memory.h"
#include "common/cpu/partial_sums.h"
#include "norm/cpu/kernels.h"

namespace inlay::norm {
namespace {

const Kernels& kernels_for(DType dtype) {
  return dtype == DType::f64 ? kGenericF64Kernels : cpu::tier_in_use(INLAY_TIERS);
}

// Memory of one thread for the rows it works on, as kernels.h says.
auto make_scratch(int64_t scratch_rows, int64_t width, DType dtype) {
  return cpu::make_memory(scratch_rows * width * size_of(wide_dtype(dtype)));
}

}  // namespace

void forward(const ForwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.x.dtype);
  const auto output = [&](const OutputTensor& rows) {
    return cpu::Output{rows.data, p.rows * p.width * size_of(rows.dtype)};
  };
  const bool stream = cpu::prepare_outputs({output(p.y), output(p.residual_out)});
  torch::stable::parallel_for(0, p.rows, cpu::grain(p.width), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kForwardScratch, p.width, p.x.dtype);
    kernels.forward(p, begin, end, scratch.get(), stream);
  });
}

// A function of the shape alone: the number of threads must have no say in the order of the sums. Enough groups to
// keep many threads busy, and enough rows in each to make their sums cheap.
int64_t partial_rows(const BackwardParams& p) { return std::clamp<int64_t>(p.rows / 32, 1, 256); }

void backward(const BackwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.dx.dtype);
  const int64_t elements = p.rows * p.width;
  const auto output = [&](const OutputTensor& rows) { return cpu::Output{rows.data, elements * size_of(rows.dtype)}; };
  const bool stream = cpu::prepare_outputs({output(p.dx), output(p.dresidual), output(p.dgate)});
  const int64_t groups = partial_rows(p);
  torch::stable::parallel_for(0, groups, cpu::grain(elements / groups), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kBackwardScratch, p.width, p.dx.dtype);
    kernels.backward(p, begin, end, groups, scratch.get(), stream);
  });
  if (!p.partials) return;
  const int64_t blocks = (p.width + cpu::kSumBlock - 1) / cpu::kSumBlock;
  torch::stable::parallel_for(0, blocks, cpu::grain(p.partial_rows * cpu::kSumBlock),
                              [&](int64_t begin, int64_t end) { kernels.sum_partials(p, begin, end); });
}

}  // namespace inlay::norm
