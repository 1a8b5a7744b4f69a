// Work that is dealt out to torch's threads piece by piece.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "common/cpu/memory.h"

namespace inlay::cpu {

// Calls body(task, memory) for each task, started in their order: whoever is free takes the next. They may take very
// different times. `memory` is the thread's own, of as many bytes.
template <class Task, class Body>
void in_order(const std::vector<Task>& tasks, int64_t memory_bytes, const Body& body) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto memory = make_memory(memory_bytes);
    for (size_t i = next++; i < tasks.size(); i = next++) body(tasks[i], memory.get());
  });
}

}  // namespace inlay::cpu
