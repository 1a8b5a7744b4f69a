// Sorts rows by their experts, and deals the experts' work out to torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/check.h"
#include "common/cpu/matrix.h"
#include "common/cpu/memory.h"
#include "common/cpu/tasks.h"
#include "moe/cpu/tiers.h"

namespace inlay::moe {
namespace {

constexpr int64_t kScratchAlignment = 64;
constexpr int64_t kMostCombineFeatures = 128;
constexpr int64_t kLeastCombineFeatures = 32;

char* aligned(void* memory) {
  return reinterpret_cast<char*>(
      cpu::round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory)), kScratchAlignment));
}

// A counting sort, which keeps the order of tokens.
void sort_rows(const ExpertForwardParams& p) {
  const ExpertInputs& in = p.inputs;
  const int64_t count = in.most_rows();
  std::vector<int32_t> next(in.experts + 1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t index = p.indices[i];
    INLAY_CHECK(index >= 0 && index <= in.experts, "moe_experts: indices must be from 0 to ", in.experts,
                " (for no expert), got ", index);
    ++next[index];
  }
  int32_t end = 0;
  for (int64_t e = 0; e <= in.experts; ++e) {
    const int32_t rows = next[e];
    next[e] = end;
    end += rows;
    if (e < in.experts) p.rows.ends[e] = end;
  }
  for (int64_t i = 0; i < count; ++i) p.rows.slots[next[p.indices[i]]++] = static_cast<int32_t>(i);
}

// Rows that came sorted.
void number_rows(const ExpertForwardParams& p) {
  const ExpertInputs& in = p.inputs;
  int64_t previous = 0;
  for (int64_t e = 0; e < in.experts; ++e) {
    const int64_t end = p.ends[e];
    INLAY_CHECK(end >= previous && end <= in.tokens, "moe_experts: ends must not decrease, and be at most ", in.tokens,
                " (rows of x), got ", end, " after ", previous);
    p.rows.ends[e] = static_cast<int32_t>(end);
    previous = end;
  }
  for (int64_t i = 0; i < in.tokens; ++i) p.rows.slots[i] = static_cast<int32_t>(i);
}

// Rows are indices into everything else: those of a backward come from outside.
void check_rows(const ExpertInputs& in, const Rows& rows) {
  const char* op = "moe_experts_bwd";
  int64_t end = 0;
  for (int64_t e = 0; e < in.experts; ++e) {
    const int64_t first = end;
    end = rows.ends[e];
    INLAY_CHECK(end >= first && end <= in.most_rows(), op, ": ends must not decrease, and be at most ", in.most_rows(),
                ", got ", end, " after ", first);
    for (int64_t row = first; row < end; ++row) {
      const int64_t slot = rows.slots[row];
      INLAY_CHECK(slot >= 0 && slot < in.most_rows() && (row == first || slot > rows.slots[row - 1]), op,
                  ": rows must be from 0 to ", in.most_rows() - 1, " and increase within an expert, got ", slot);
    }
  }
}

// An expert's tiles follow each other, so that its weights are still in the cache.
std::vector<UpTask> up_tasks(const ExpertInputs& in, const Rows& rows) {
  std::vector<UpTask> tasks;
  for (int64_t e = 0; e < in.experts; ++e) {
    const int64_t first = e > 0 ? rows.ends[e - 1] : 0, last = rows.ends[e];
    if (first == last) continue;
    for (int64_t feature = 0; feature < in.intermediate; feature += kUpFeatures) {
      const int64_t features = std::min(kUpFeatures, in.intermediate - feature);
      const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of about as many rows each
        const int64_t row = first + (last - first) * tile / tiles;
        tasks.push_back({e, row, first + (last - first) * (tile + 1) / tiles - row, feature, features});
      }
    }
  }
  return tasks;
}

// Wide blocks of features pack the values less often, but few of them would leave threads idle.
std::vector<CombineTask> combine_tasks(const ExpertInputs& in, int64_t features) {
  const int64_t chunks = (in.tokens + kCombineTokens - 1) / kCombineTokens;
  int64_t width = kMostCombineFeatures;
  while (width > kLeastCombineFeatures && features / width * chunks < 4 * torch::stable::get_num_threads()) width /= 2;
  std::vector<CombineTask> tasks;
  for (int64_t token = 0; token < in.tokens; token += kCombineTokens) {
    for (int64_t feature = 0; feature < features; feature += width) {
      tasks.push_back(
          {token, std::min(token + kCombineTokens, in.tokens), feature, std::min(width, features - feature)});
    }
  }
  return tasks;
}

void combine(const Kernels& kernels, const Combination& combination) {
  const ExpertInputs& in = *combination.inputs;
  cpu::in_order(combine_tasks(in, combination.features), kernels.expert_bytes(in),
                [&](const CombineTask& task, void* memory) { kernels.combine(combination, task, memory); });
}

void up(const Kernels& kernels, const ExpertForwardParams& p, void* activations) {
  cpu::in_order(up_tasks(p.inputs, p.rows), kernels.expert_bytes(p.inputs),
                [&](const UpTask& task, void* memory) { kernels.up(p, activations, task, memory); });
}

void outer(const Kernels& kernels, const OuterProducts& products) {
  const ExpertInputs& in = *products.inputs;
  std::vector<OuterTask> tasks;
  for (int64_t e = 0; e < in.experts; ++e) {
    for (int64_t row = 0; row < products.height; row += kTileFeatures) {
      for (int64_t column = 0; column < products.width; column += kOuterColumns) {
        tasks.push_back({e, row, std::min(kTileFeatures, products.height - row), column,
                         std::min(kOuterColumns, products.width - column)});
      }
    }
  }
  cpu::in_order(tasks, kernels.expert_bytes(in),
                [&](const OuterTask& task, void* memory) { kernels.outer(products, task, memory); });
}

void sum_rows(const Kernels& kernels, const ExpertInputs& in, const Rows& rows, const RowSource& source, int64_t width,
              const OutputTensor& out) {
  if (!out.data) return;
  std::vector<int64_t> experts(in.experts);
  for (int64_t e = 0; e < in.experts; ++e) experts[e] = e;
  cpu::in_order(experts, kernels.expert_bytes(in),
                [&](int64_t expert, void* memory) { kernels.sum_rows(in, rows, source, expert, width, out, memory); });
}

// Where the parts of the backward's scratch memory begin, and its end.
struct ScratchLayout {
  explicit ScratchLayout(const ExpertBackwardParams& p) {
    const ExpertInputs& in = p.inputs;
    const int64_t rows = in.most_rows(), element = size_of(in.x.dtype);
    const int64_t blocks = (in.intermediate + kUpFeatures - 1) / kUpFeatures;
    const auto take = [&](bool wanted, int64_t bytes) {
      const int64_t begin = end;
      if (wanted) end += cpu::round_up(bytes, kScratchAlignment);
      return begin;
    };
    h = take(!p.h.data, rows * in.pre_activations() * element);
    dh = take(true, rows * in.pre_activations() * element);
    // The forward run again has activations to put somewhere.
    a = take(p.ddown_proj.data || !p.h.data, rows * in.intermediate * element);
    weights = take(p.dweights.data, rows * blocks * size_of(wide_dtype(in.x.dtype)));
  }
  int64_t h, dh, a, weights, end = 0;
};

}  // namespace

int64_t scratch_bytes(const ExpertForwardParams& p) {
  return p.inputs.most_rows() * p.inputs.intermediate * size_of(p.inputs.x.dtype) + kScratchAlignment;
}

int64_t scratch_bytes(const ExpertBackwardParams& p) { return ScratchLayout(p).end + kScratchAlignment; }

void forward(const ExpertForwardParams& p, void*) {
  const ExpertInputs& in = p.inputs;
  const int64_t element = size_of(in.x.dtype);
  cpu::prepare_outputs({{p.y.data, in.tokens * in.hidden * element},
                        {p.h.data, in.most_rows() * in.pre_activations() * element},
                        {p.scratch, scratch_bytes(p)}});
  const Kernels& kernels = kernels_for(in.x.dtype);
  if (p.sorted) {
    number_rows(p);
  } else {
    sort_rows(p);
  }
  void* activations = aligned(p.scratch);
  up(kernels, p, activations);
  Combination combination;
  combination.inputs = &in;
  combination.rows = p.rows;
  combination.values = {activations, in.intermediate};
  combination.matrices = in.down_proj;
  combination.depth_is_rows = in.transposed;
  combination.bias = in.down_bias;
  combination.weights = in.weights;
  combination.shared = in.shared;
  combination.shared_gate = in.shared_gate;
  combination.y = p.y;
  combination.features = in.hidden;
  combine(kernels, combination);
}

void backward(const ExpertBackwardParams& p, void*) {
  const ExpertInputs& in = p.inputs;
  check_rows(in, p.rows);
  const int64_t element = size_of(in.x.dtype), matrix = in.experts * in.intermediate * in.hidden * element;
  cpu::prepare_outputs({{p.dx.data, in.tokens * in.hidden * element},
                        {p.dgate_up_proj.data, (in.gating.gated ? 2 : 1) * matrix},
                        {p.ddown_proj.data, matrix},
                        {p.scratch, scratch_bytes(p)}});
  const Kernels& kernels = kernels_for(in.x.dtype);
  const ScratchLayout layout(p);
  char* memory = aligned(p.scratch);
  BackwardScratch scratch;
  scratch.dh = memory + layout.dh;
  if (p.ddown_proj.data) scratch.a = memory + layout.a;
  if (p.dweights.data) scratch.weights = memory + layout.weights;
  ExpertBackwardParams own = p;
  if (!p.h.data) {
    ExpertForwardParams again;
    again.inputs = in;
    again.rows = p.rows;
    again.h = {memory + layout.h, in.x.dtype};
    up(kernels, again, memory + layout.a);
    own.h.data = memory + layout.h;
  }

  if (p.dx.data || p.dweights.data || p.dgate_up_proj.data || p.ddown_proj.data || p.dgate_up_bias.data) {
    cpu::in_order(up_tasks(in, p.rows), kernels.expert_bytes(in), [&](const UpTask& task, void* thread_memory) {
      kernels.activation_gradient(own, scratch, task, thread_memory);
    });
  }
  if (p.dweights.data) {  // zero for slots of no expert
    std::memset(p.dweights.data, 0, in.most_rows() * size_of(p.dweights.dtype));
    kernels.weight_gradients(own, scratch, 0, in.experts > 0 ? p.rows.ends[in.experts - 1] : 0);
  }
  const RowSource dh{scratch.dh, in.pre_activations(), false, false};
  const RowSource dy{p.dy.data, p.dy.layout.outer_stride, true, true};
  if (p.dx.data) {
    Combination combination;
    combination.inputs = &in;
    combination.rows = p.rows;
    combination.values = {scratch.dh, in.pre_activations()};
    combination.matrices = in.gate_up_proj;
    combination.depth_is_rows = !in.transposed;
    combination.y = p.dx;
    combination.features = in.hidden;
    combine(kernels, combination);
  }
  const auto gradient_of = [&](const RowSource& out_side, int64_t out, const RowSource& in_side, int64_t width,
                               const OutputTensor& result) {
    if (!result.data) return;
    OuterProducts products{&in, p.rows, out_side, in_side, out, width, result};
    if (in.transposed) {
      std::swap(products.left, products.right);
      std::swap(products.height, products.width);
    }
    outer(kernels, products);
  };
  const RowSource x{in.x.data, in.x.layout.outer_stride, true, false};
  const RowSource a{scratch.a, in.intermediate, false, false};
  gradient_of(dh, in.pre_activations(), x, in.hidden, p.dgate_up_proj);
  gradient_of(dy, in.hidden, a, in.intermediate, p.ddown_proj);
  sum_rows(kernels, in, p.rows, dh, in.pre_activations(), p.dgate_up_bias);
  sum_rows(kernels, in, p.rows, dy, in.hidden, p.ddown_bias);
  if (p.dshared.data || p.dshared_gate.data) {
    constexpr int64_t kGrain = 16;  // tokens that are worth waking a second thread
    torch::stable::parallel_for(0, in.tokens, kGrain,
                                [&](int64_t begin, int64_t end) { kernels.shared_gradients(own, begin, end); });
  }
}

}  // namespace inlay::moe
