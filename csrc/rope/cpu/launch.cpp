// Chooses the kernels for this machine and splits the tokens over torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>

#include "common/cpu/isa.h"
#include "common/cpu/memory.h"
#include "common/cpu/partial_sums.h"
#include "rope/cpu/kernels.h"

namespace inlay::rope {
namespace {

// Less than this many elements are not worth waking a second thread.
constexpr int64_t kElementsPerThread = 32768;

const Kernels& kernels_for(DType dtype) {
  if (dtype == DType::f64) return kGenericF64Kernels;
  switch (cpu::isa_in_use()) {
#ifdef __x86_64__
    case cpu::Isa::amx_bf16:  // tiles have nothing to offer to a rotation
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

std::unique_ptr<char[]> make_scratch(int64_t rows, const Problem& p) {
  return std::unique_ptr<char[]>(new char[rows * p.width * size_of(wide_dtype(p.dtype))]);
}

int64_t elements_of_token(const Problem& p, int64_t heads) { return heads * p.width; }

// Makes both outputs ready to be written. Returns whether to stream them past the caches: when they would push each
// other out before anyone reads them.
template <class Side>
bool prepare_outputs(const Problem& p, const Side& q, void* q_out, const Side& k, void* k_out) {
  const int64_t rows = p.batch * p.tokens * size_of(p.dtype);
  const int64_t q_bytes = rows * elements_of_token(p, q.heads), k_bytes = rows * elements_of_token(p, k.heads);
  cpu::prefer_huge_pages(q_out, q_bytes);
  cpu::prefer_huge_pages(k_out, k_bytes);
  return q_bytes + k_bytes > cpu::last_level_cache_bytes() / 2;
}

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements)); }

// A function of the shape alone: the number of threads must have no say in the order of the sums. Enough groups to
// keep many threads busy, and enough rows in each to make their sums cheap.
int64_t groups_of_tokens(const BackwardParams& p) {
  const int64_t tokens = p.batch * p.tokens;
  const int64_t most = std::min<int64_t>(tokens, 256);
  return std::clamp<int64_t>(tokens * (p.q.heads + p.k.heads) / 32, 1, std::max<int64_t>(1, most));
}

}  // namespace

void forward(const ForwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.dtype);
  const bool stream = prepare_outputs(p, p.q, p.q.y.data, p.k, p.k.y.data);
  const int64_t elements = elements_of_token(p, p.q.heads + p.k.heads);
  torch::stable::parallel_for(0, p.batch * p.tokens, grain(elements), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kForwardScratch, p);
    kernels.forward(p, begin, end, scratch.get(), stream);
  });
}

PartialRows partial_rows(const BackwardParams& p) { return {groups_of_tokens(p), groups_of_tokens(p)}; }

void backward(const BackwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.dtype);
  const bool stream = prepare_outputs(p, p.q, p.q.dx.data, p.k, p.k.dx.data);
  const int64_t groups = groups_of_tokens(p);
  const int64_t elements = p.batch * p.tokens * elements_of_token(p, p.q.heads + p.k.heads);
  torch::stable::parallel_for(0, groups, grain(elements / groups), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kBackwardScratch, p);
    kernels.backward(p, begin, end, groups, scratch.get(), stream);
  });
  const int64_t blocks = (p.width + cpu::kSumBlock - 1) / cpu::kSumBlock;
  for (const BackwardSide* side : {&p.q, &p.k}) {
    if (!side->partials) continue;
    torch::stable::parallel_for(0, blocks, grain(side->partial_rows * cpu::kSumBlock),
                                [&](int64_t begin, int64_t end) { kernels.sum_partials(*side, p.width, begin, end); });
  }
}

}  // namespace inlay::rope
