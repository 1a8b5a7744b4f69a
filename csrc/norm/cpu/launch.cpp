// Chooses the kernels for this machine and splits the rows over torch's threads.
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "common/cpu/isa.h"
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

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    constexpr int64_t kDefault = int64_t{32} << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
    const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (reported > 0) return reported;
#endif
    return kDefault;
  }();
  return bytes;
}

int64_t bytes_of(const OutputTensor& output, int64_t elements) {
  return output.data ? elements * size_of(output.dtype) : 0;
}

// Whether outputs of this size would push each other out of the cache before anyone reads them.
bool exceeds_caches(int64_t output_bytes) { return output_bytes > last_level_cache_bytes() / 2; }

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements)); }

}  // namespace

void forward(const ForwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.x.dtype);
  const int64_t elements = p.rows * p.width;
  const bool stream = exceeds_caches(bytes_of(p.y, elements) + bytes_of(p.residual_out, elements));
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
  const bool stream =
      exceeds_caches(bytes_of(p.dx, elements) + bytes_of(p.dresidual, elements) + bytes_of(p.dgate, elements));
  const int64_t groups = partial_rows(p);
  torch::stable::parallel_for(0, groups, grain(elements / groups), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kBackwardScratch, p.width, p.dx.dtype);
    kernels.backward(p, begin, end, groups, scratch.get(), stream);
  });
  if (!p.partials) return;
  const int64_t blocks = (p.width + kSumBlock - 1) / kSumBlock;
  torch::stable::parallel_for(0, blocks, grain(p.partial_rows * kSumBlock),
                              [&](int64_t begin, int64_t end) { kernels.sum_partials(p, begin, end); });
}

}  // namespace inlay::norm
