// Chooses the kernels for this machine and splits the tokens over torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu/launch.h"
#include "common/cpu/memory.h"
#include "common/cpu/partial_sums.h"
#include "rope/cpu/kernels.h"

namespace inlay::rope {
namespace {

const Kernels& kernels_for(DType dtype) {
  return dtype == DType::f64 ? kGenericF64Kernels : cpu::tier_in_use(INLAY_TIERS);
}

// Memory of one thread for the heads it works on, as kernels.h says.
auto make_scratch(int64_t rows, const Problem& p) {
  return cpu::make_memory(rows * p.width * size_of(wide_dtype(p.dtype)));
}

int64_t elements_of_token(const Problem& p, int64_t heads) { return heads * p.width; }

cpu::Output output(const Problem& p, int64_t heads, void* data) {
  return {data, p.batch * p.tokens * elements_of_token(p, heads) * size_of(p.dtype)};
}

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
  const bool stream = cpu::prepare_outputs({output(p, p.q.heads, p.q.y.data), output(p, p.k.heads, p.k.y.data)});
  const int64_t elements = elements_of_token(p, p.q.heads + p.k.heads);
  torch::stable::parallel_for(0, p.batch * p.tokens, cpu::grain(elements), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kForwardScratch, p);
    kernels.forward(p, begin, end, scratch.get(), stream);
  });
}

PartialRows partial_rows(const BackwardParams& p) { return {groups_of_tokens(p), groups_of_tokens(p)}; }

void backward(const BackwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.dtype);
  const bool stream = cpu::prepare_outputs({output(p, p.q.heads, p.q.dx.data), output(p, p.k.heads, p.k.dx.data)});
  const int64_t groups = groups_of_tokens(p);
  const int64_t elements = p.batch * p.tokens * elements_of_token(p, p.q.heads + p.k.heads);
  torch::stable::parallel_for(0, groups, cpu::grain(elements / groups), [&](int64_t begin, int64_t end) {
    const auto scratch = make_scratch(kBackwardScratch, p);
    kernels.backward(p, begin, end, groups, scratch.get(), stream);
  });
  const int64_t blocks = (p.width + cpu::kSumBlock - 1) / cpu::kSumBlock;
  for (const BackwardSide* side : {&p.q, &p.k}) {
    if (!side->partials) continue;
    torch::stable::parallel_for(0, blocks, cpu::grain(side->partial_rows * cpu::kSumBlock),
                                [&](int64_t begin, int64_t end) { kernels.sum_partials(*side, p.width, begin, end); });
  }
}

}  // namespace inlay::rope
