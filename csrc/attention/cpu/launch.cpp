// Chooses the kernels for this machine and deals tiles of queries and blocks of keys out to torch's threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "attention/cpu/kernels.h"
#include "common/check.h"
#include "common/cpu/launch.h"
#include "common/cpu/matrix.h"
#include "common/cpu/memory.h"
#include "common/cpu/offsets.h"
#include "common/cpu/tasks.h"

namespace inlay::attention {
namespace {

constexpr int64_t kScratchAlignment = 64;

const Kernels& kernels_for(DType dtype) {
  return dtype == DType::f64 ? kGenericF64Kernels : cpu::tier_in_use(INLAY_TIERS);
}

void check_values(const char* op, const Inputs& inputs) {
  for (const Sequences* sequences : {&inputs.queries, &inputs.keys}) {
    if (!sequences->offsets) continue;
    const char* name = sequences == &inputs.queries ? "cu_seqlens_q" : "cu_seqlens_k";
    cpu::check_offsets(op, name, sequences->count, sequences->tokens,
                       [&](int64_t i) { return sequences->raw_offset(i); });
  }
  for (int64_t i = 0; i < inputs.kv_lengths.size; ++i) {
    const int64_t length = inputs.kv_lengths[i];
    INLAY_CHECK(length >= 0 && length <= inputs.keys.tokens, op, ": kv_lengths must be from 0 to the number of keys ",
                inputs.keys.tokens, ", got ", length);
  }
}

int64_t length_of(const Sequences& sequences, int64_t i) {
  const Sequence sequence = sequences[i];
  return sequence.end - sequence.begin;
}

// Tiles of `queries` queries, the last of each sequence first: with a causal mask, those see the most keys.
std::vector<QueryTask> query_tasks(const Inputs& inputs, int64_t queries) {
  std::vector<QueryTask> tasks;
  for (int64_t sequence = 0; sequence < inputs.queries.count; ++sequence) {
    const int64_t length = length_of(inputs.queries, sequence);
    for (int64_t head = 0; head < inputs.key_heads; ++head) {
      for (int64_t tile = (length + queries - 1) / queries - 1; tile >= 0; --tile) {
        tasks.push_back({sequence, head, tile * queries, std::min(queries, length - tile * queries)});
      }
    }
  }
  return tasks;
}

// Few rows a tile pack the keys more often, but a head of few tiles would leave threads idle. A row's numbers do not
// depend on its tile.
int64_t forward_queries(const Inputs& inputs) {
  constexpr int64_t kLeastRows = 48;
  const int64_t rows = inputs.batch * inputs.queries.tokens * inputs.query_heads;
  const int64_t share = rows / (4 * torch::stable::get_num_threads());
  return queries_of(std::clamp(share, kLeastRows, std::max(kLeastRows, forward_rows(inputs))), inputs.group());
}

// Blocks of keys, all heads of one before the next: the parts of dq are added in the order of the blocks, and a thread
// seldom waits for another if they are at different heads.
std::vector<KeyTask> key_tasks(const Inputs& inputs) {
  const int64_t step = backward_block(inputs);
  std::vector<KeyTask> tasks;
  for (int64_t sequence = 0; sequence < inputs.keys.count; ++sequence) {
    const int64_t blocks = (length_of(inputs.keys, sequence) + step - 1) / step;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t head = 0; head < inputs.key_heads; ++head) tasks.push_back({sequence, head, block});
    }
  }
  return tasks;
}

// A dimension that the bias has one of is added up by each task; of the others, tasks take `step` at a time.
std::vector<BiasTask> bias_tasks(const BackwardParams& p) {
  const Inputs& inputs = p.inputs;
  const int64_t full[] = {inputs.batch, inputs.query_heads, inputs.queries.tokens, inputs.keys.tokens};
  const int64_t steps[] = {1, 1, kBiasQueries, backward_block(inputs)};
  std::vector<BiasTask> tasks(1);
  for (int dimension = 0; dimension < 4; ++dimension) {
    const int64_t step = p.dbias.sizes[dimension] == 1 ? std::max<int64_t>(full[dimension], 1) : steps[dimension];
    std::vector<BiasTask> split;
    for (const BiasTask& task : tasks) {
      for (int64_t begin = 0; begin < std::max(full[dimension], p.dbias.sizes[dimension]); begin += step) {
        split.push_back(task);
        split.back().begin[dimension] = begin;
        split.back().end[dimension] = std::min(begin + step, full[dimension]);
      }
    }
    tasks = std::move(split);
  }
  return tasks;
}

// Where the parts of the scratch memory begin, and its end.
struct ScratchLayout {
  explicit ScratchLayout(const BackwardParams& p) {
    const Inputs& inputs = p.inputs;
    const int64_t element = size_of(wide_dtype(inputs.q.dtype));
    const int64_t rows = inputs.batch * inputs.queries.tokens * inputs.query_heads;
    const int64_t tiles = inputs.key_heads == 0 ? 0 : inputs.queries.chunk_bound(backward_queries(inputs));
    const auto after = [](int64_t bytes) { return cpu::round_up(bytes, kScratchAlignment); };
    const bool f64 = inputs.q.dtype == DType::f64;
    const auto matrix = [&](int64_t width) {
      return after(rows * (f64 ? cpu::padded_stride<double>(width) : cpu::padded_stride<float>(width)) * element);
    };
    q = after(rows * element);
    dout = q + matrix(inputs.head_dim);
    dq = dout + matrix(inputs.value_dim);
    this->tiles = dq + matrix(inputs.head_dim);
    finished = this->tiles + after(tiles * static_cast<int64_t>(sizeof(TileKeys)));
    end = finished + after(tiles * inputs.key_heads * static_cast<int64_t>(sizeof(int32_t)));
  }
  int64_t q, dout, dq, tiles, finished, end;
};

BackwardScratch scratch_of(const BackwardParams& p) {
  const ScratchLayout layout(p);
  auto* memory = reinterpret_cast<char*>(
      cpu::round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(p.scratch)), kScratchAlignment));
  std::memset(memory + layout.finished, 0, layout.end - layout.finished);
  return {memory,
          memory + layout.q,
          memory + layout.dout,
          memory + layout.dq,
          reinterpret_cast<TileKeys*>(memory + layout.tiles),
          reinterpret_cast<int32_t*>(memory + layout.finished)};
}

void find_tile_keys(const Inputs& inputs, TileKeys* tiles) {
  const int64_t step = backward_queries(inputs);
  for (int64_t n = 0; n < inputs.queries.count; ++n) {
    const Sequence queries = inputs.queries[n], keys = inputs.keys[n];
    const int64_t length = queries.end - queries.begin, key_count = inputs.key_count(n, keys);
    const int64_t diagonal = keys.end - keys.begin - length;
    TileKeys* tile = tiles + inputs.queries.first_chunk(n, step);
    for (int64_t begin = 0; begin < length; begin += step, ++tile) {
      *tile = {{key_count, 0}, {0, key_count}};
      for (int64_t i = begin; i < std::min(begin + step, length); ++i) {
        const KeyRange own = inputs.visible(i, key_count, diagonal, queries.batch, queries.begin + i);
        if (!own.empty()) tile->any = {std::min(tile->any.begin, own.begin), std::max(tile->any.end, own.end)};
        tile->all = {std::max(tile->all.begin, own.begin), std::min(tile->all.end, own.end)};
      }
    }
  }
}

}  // namespace

void forward(const ForwardParams& p, void*) {
  const Inputs& inputs = p.inputs;
  check_values("attention", inputs);
  const Kernels& kernels = kernels_for(inputs.q.dtype);
  cpu::in_order(query_tasks(inputs, forward_queries(inputs)), kernels.forward_bytes(inputs),
                [&](const QueryTask& task, void* memory) { kernels.forward(p, task, memory); });
}

int64_t scratch_bytes(const ForwardParams&) { return 0; }
int64_t scratch_bytes(const BackwardParams& p) { return ScratchLayout(p).end + kScratchAlignment; }

void backward(const BackwardParams& p, void*) {
  const Inputs& inputs = p.inputs;
  check_values("attention_bwd", inputs);
  const Kernels& kernels = kernels_for(inputs.q.dtype);
  const BackwardScratch scratch = scratch_of(p);
  const int64_t bytes = kernels.backward_bytes(inputs);
  const bool has_rows = inputs.query_heads > 0;
  if (has_rows) {
    find_tile_keys(inputs, scratch.tiles);
    constexpr int64_t kGrain = 1 << 14;  // elements that are worth waking a second thread
    const int64_t grain = std::max<int64_t>(1, kGrain / (inputs.query_heads * inputs.value_dim));
    torch::stable::parallel_for(0, inputs.batch * inputs.queries.tokens, grain,
                                [&](int64_t begin, int64_t end) { kernels.prepare(p, scratch, begin, end); });
  }
  cpu::in_order(key_tasks(inputs), bytes,
                [&](const KeyTask& task, void* memory) { kernels.backward(p, scratch, task, memory); });
  if (has_rows) {
    const std::vector<QueryTask> tiles = query_tasks(inputs, backward_queries(inputs));
    torch::stable::parallel_for(0, static_cast<int64_t>(tiles.size()), 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernels.store_dq(p, scratch, tiles[i]);
    });
  }
  if (p.dbias.data) {
    cpu::in_order(bias_tasks(p), bytes,
                  [&](const BiasTask& task, void* memory) { kernels.bias_gradient(p, scratch, task, memory); });
  }
  if (p.dsinks.data) {
    torch::stable::parallel_for(0, inputs.query_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) kernels.sink_gradient(p, scratch, head);
    });
  }
}

}  // namespace inlay::attention
