// Chooses the kernels for this machine and deals the heads and sequences out to torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "common/cpu/launch.h"
#include "common/cpu/matrix.h"
#include "common/cpu/memory.h"
#include "common/cpu/offsets.h"
#include "gdn/cpu/kernels.h"

namespace inlay::gdn {
namespace {

// Less than this many multiply-adds are not worth waking a second thread.
constexpr int64_t kWorkPerThread = 1 << 17;

const Kernels& kernels_for(DType dtype) {
  return dtype == DType::f64 ? kGenericF64Kernels : cpu::tier_in_use(INLAY_TIERS);
}

void check_offsets(const char* op, const Sequences& sequences) {
  if (!sequences.offsets) return;
  cpu::check_offsets(op, "cu_seqlens", sequences.count, sequences.tokens,
                     [&](int64_t i) { return sequences.raw_offset(i); });
}

// Columns a task takes: all of them, or fewer where there are more threads than heads. Columns do not see each other,
// so the numbers do not depend on that.
int64_t columns_per_task(const Inputs& inputs) {
  const int64_t heads = std::max<int64_t>(1, inputs.sequences.count * inputs.value_heads);
  const int64_t most = std::max<int64_t>(1, inputs.value_dim / (2 * kColumnMultiple));
  const int64_t parts = std::clamp<int64_t>(torch::stable::get_num_threads() / heads, 1, most);
  return cpu::round_up((inputs.value_dim + parts - 1) / parts, kColumnMultiple);
}

// Calls body(task, memory) for every head, column range and sequence. Heads vary slowest: each thread then gets its
// share of every sequence, however their lengths differ.
template <class Body>
void for_each_task(const Inputs& inputs, int64_t columns, const Kernels& kernels, Work work, const Body& body) {
  const int64_t parts = (inputs.value_dim + columns - 1) / columns, sequences = inputs.sequences.count;
  const int64_t tasks = inputs.value_heads * parts * sequences;
  if (tasks == 0) return;
  const int64_t tokens = std::max<int64_t>(1, inputs.batch * inputs.sequences.tokens / sequences);
  const int64_t work_per_task = tokens * inputs.key_dim * columns;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / work_per_task);
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const auto memory = cpu::make_memory(kernels.memory_bytes(inputs, work));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i / sequences % parts * columns;
      const Task task{i % sequences, i / (sequences * parts), column, std::min(columns, inputs.value_dim - column)};
      body(task, memory.get());
    }
  });
}

int64_t state_elements(const Inputs& inputs) {
  const int64_t stride = inputs.q.dtype == DType::f64 ? cpu::padded_stride<double>(inputs.value_dim)
                                                      : cpu::padded_stride<float>(inputs.value_dim);
  return inputs.sequences.chunk_bound(kChunk) * inputs.value_heads * inputs.key_dim * stride;
}

// Of dq, or of dk.
int64_t group_elements(const Inputs& inputs) {
  return inputs.group() == 1 ? 0 : inputs.batch * inputs.sequences.tokens * inputs.value_heads * inputs.key_dim;
}

BackwardScratch scratch_of(const BackwardParams& p) {
  char* memory = static_cast<char*>(p.scratch);
  const int64_t element = size_of(p.dg.dtype);
  char* dq = memory + state_elements(p.inputs) * element;
  return {memory, dq, dq + group_elements(p.inputs) * element};
}

}  // namespace

void forward(const ForwardParams& p, void*) {
  check_offsets("gated_delta_rule", p.inputs.sequences);
  const Kernels& kernels = kernels_for(p.inputs.q.dtype);
  for_each_task(p.inputs, columns_per_task(p.inputs), kernels, Work::forward,
                [&](const Task& task, void* memory) { kernels.forward(p, task, memory); });
}

void step(const StepParams& p, void*) {
  const Kernels& kernels = kernels_for(p.inputs.q.dtype);
  for_each_task(p.inputs, columns_per_task(p.inputs), kernels, Work::recurrent,
                [&](const Task& task, void* memory) { kernels.step(p, task, memory); });
}

int64_t scratch_elements(const ForwardParams&) { return 0; }  // each thread makes its own

int64_t scratch_elements(const BackwardParams& p) { return state_elements(p.inputs) + 2 * group_elements(p.inputs); }

void backward(const BackwardParams& p, void*) {
  const Inputs& inputs = p.inputs;
  check_offsets("gated_delta_rule_bwd", inputs.sequences);
  const Kernels& kernels = kernels_for(inputs.q.dtype);
  const BackwardScratch scratch = scratch_of(p);
  for_each_task(inputs, columns_per_task(inputs), kernels, Work::forward,
                [&](const Task& task, void* memory) { kernels.backward_states(p, scratch, task, memory); });
  for_each_task(inputs, inputs.value_dim, kernels, Work::backward,
                [&](const Task& task, void* memory) { kernels.backward(p, scratch, task, memory); });
  if (inputs.group() == 1) return;
  const int64_t rows = inputs.batch * inputs.sequences.tokens;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (2 * inputs.value_heads * inputs.key_dim));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const auto memory = cpu::make_memory(kernels.memory_bytes(inputs, Work::recurrent));
    kernels.sum_group(p, scratch, begin, end, memory.get());
  });
}

// A gate takes about as long as this many multiply-adds.
constexpr int64_t kWorkPerGate = 32;

void gates(const GatesParams& p, void*) {
  const Kernels& kernels = kernels_for(p.g.dtype);
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (p.heads * kWorkPerGate));
  torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) { kernels.gates(p, begin, end); });
}

// A function of the shape alone: the number of threads must have no say in the order of the sums.
int64_t partial_rows(const GatesBackwardParams& p) { return std::clamp<int64_t>(p.rows / 64, 1, 128); }

void gates_backward(const GatesBackwardParams& p, void*) {
  const Kernels& kernels = kernels_for(p.dg.dtype);
  const int64_t ranges = p.partials ? p.partial_rows : p.rows;
  const int64_t rows_per_range = p.partials ? std::max<int64_t>(1, p.rows / p.partial_rows) : 1;
  const int64_t grain = std::max<int64_t>(1, kWorkPerThread / (p.heads * kWorkPerGate * rows_per_range));
  torch::stable::parallel_for(0, ranges, grain,
                              [&](int64_t begin, int64_t end) { kernels.gates_backward(p, begin, end); });
  if (p.partials) kernels.sum_gate_partials(p);
}

}  // namespace inlay::gdn
