// Chooses the kernels for this machine and splits the rows over torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <memory>

#include "common/cpu/isa.h"
#include "common/cpu/memory.h"
#include "common/cpu/partial_sums.h"
#include "norm/cpu/kernels.h"

namespace inlay::norm {
namespace {

// Less than this many elements are not worth waking a second thread.
constexpr int64_t kElementsPerThread = 32768;

const Kernels& kernels_for(DType dtype) {
  if (dtype == DType::f64) return kGenericF64Kernels;
  switch (cpu::isa_in_use()) {
#ifdef __x86_64__
    case cpu::Isa::amx_bf16:  // tiles have nothing to offer to a norm
    case cpu::Isa::avx512_bf16:
      return kAvx512Bf16Kernels;
    case cpu::Isa::avx512:
      return kAvx512Kernels;
    case cpu::Isa::avx2:
      return kAvx2Kernels;
#endif
    default:
      return kGenericKernels;
  }
}

// Memory of one thread for the rows it works on, as kernels.h says.
std::unique_ptr<char[]> make_scratch(int64_t scratch_rows, int64_t width, DType dtype) {
  const int64_t element_size = dtype == DType::f64 ? 8 : 4;
  return std::unique_ptr<char[]>(new char[scratch_rows * width * element_size]);
}

// Makes outputs of this many elements ready to be written. Returns whether to stream them past the caches: when they
// would push each other out before anyone reads them.
bool prepare_outputs(std::initializer_list<OutputTensor> outputs, int64_t elements) {
  int64_t total = 0;
  for (const OutputTensor& output : outputs) {
    if (!output.data) continue;
    const int64_t bytes = elements * size_of(output.dtype);
    cpu::prefer_huge_pages(output.data, bytes);
    total += bytes;
  }
  return total > cpu::last_level_cache_bytes() / 2;
}

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements)); }

}  // namespace

void forward(const ForwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.x.dtype);
  const bool stream = prepare_outputs({p.y, p.residual_out}, p.rows * p.width);
  torch::stable::parallel_for(0, p.rows, grain(p.width), [&](int64_t begin, int64_t end) {
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
  const bool stream = prepare_outputs({p.dx, p.dresidual, p.dgate}, elements);
  const int64_t groups = partial_rows(p);
  torch::stable::parallel_for(0, groups, grain(elements / groups), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kBackwardScratch, p.width, p.dx.dtype);
    kernels.backward(p, begin, end, groups, scratch.get(), stream);
  });
  if (!p.partials) return;
  const int64_t blocks = (p.width + cpu::kSumBlock - 1) / cpu::kSumBlock;
  torch::stable::parallel_for(0, blocks, grain(p.partial_rows * cpu::kSumBlock),
                              [&](int64_t begin, int64_t end) { kernels.sum_partials(p, begin, end); });
}

}  // namespace inlay::norm
