// Deals tokens out to torch's threads, for the router.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "common/check.h"
#include "common/cpu/memory.h"
#include "moe/cpu/tiers.h"

namespace inlay::moe {
namespace {

constexpr int64_t kLogitsPerThread = 4096;  // that are worth waking a second thread

int64_t grain(const RouterInputs& in, int64_t tokens_of_one) {
  return std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, in.experts * tokens_of_one));
}

// A function of the shape alone: the number of threads has no say in the order of the sums.
int64_t groups_of(const RouterInputs& in) { return std::clamp<int64_t>(in.tokens / 64, 1, 64); }

void check_forced(const RouterForwardParams& p) {
  const RouterInputs& in = p.inputs;
  for (int64_t i = 0; p.forced.data && i < in.tokens * in.slots; ++i) {
    const int64_t index = p.forced[i];
    INLAY_CHECK(index >= 0 && index < in.experts, "moe_router: forced_indices must be from 0 to ", in.experts - 1,
                ", got ", index);
  }
}

}  // namespace

// Threads have memory of their own.
int64_t scratch_bytes(const RouterForwardParams&) { return 0; }

void route(const RouterForwardParams& p, void*) {
  check_forced(p);
  const RouterInputs& in = p.inputs;
  const Kernels& kernels = kernels_for(in.logits.dtype);
  const int64_t bytes = kernels.router_bytes(in);
  if (!p.counts) {
    torch::stable::parallel_for(0, in.tokens, grain(in, 1), [&](int64_t begin, int64_t end) {
      const auto memory = cpu::make_memory(bytes);
      kernels.route(p, begin, end, nullptr, nullptr, memory.get());
    });
    return;
  }
  const int64_t groups = groups_of(in), wide = size_of(wide_dtype(in.logits.dtype));
  const int64_t count_bytes = groups * in.experts * static_cast<int64_t>(sizeof(int64_t));
  const auto partials = cpu::make_memory(count_bytes + groups * in.experts * wide);
  auto* counts = static_cast<int64_t*>(partials.get());
  char* sums = static_cast<char*>(partials.get()) + count_bytes;
  std::memset(partials.get(), 0, count_bytes + groups * in.experts * wide);
  torch::stable::parallel_for(0, groups, grain(in, in.tokens / groups), [&](int64_t begin, int64_t end) {
    const auto memory = cpu::make_memory(bytes);
    for (int64_t group = begin; group < end; ++group) {
      kernels.route(p, in.tokens * group / groups, in.tokens * (group + 1) / groups, counts + group * in.experts,
                    sums + group * in.experts * wide, memory.get());
    }
  });
  int64_t counted = in.tokens;
  if (in.mask) counted = std::count_if(in.mask, in.mask + in.tokens, [](uint8_t masked_in) { return masked_in != 0; });
  for (int64_t e = 0; e < in.experts; ++e) {
    p.counts[e] = 0;
    for (int64_t group = 0; group < groups; ++group) p.counts[e] += counts[group * in.experts + e];
  }
  kernels.mean(sums, groups, in.experts, counted, p.mean_probabilities);
}

void route_backward(const RouterBackwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.inputs.logits.dtype);
  const int64_t bytes = kernels.router_bytes(p.inputs);
  torch::stable::parallel_for(0, p.inputs.tokens, grain(p.inputs, 1), [&](int64_t begin, int64_t end) {
    const auto memory = cpu::make_memory(bytes);
    kernels.route_backward(p, begin, end, memory.get());
  });
}

}  // namespace inlay::moe
