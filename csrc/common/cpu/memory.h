// What kernels over large tensors need to know about memory, and to tell it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>

namespace inlay::cpu {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Scratch memory, aligned to lines of the cache. Throws std::bad_alloc.
std::unique_ptr<void, Free> make_memory(int64_t bytes);

// Memory that a kernel is about to write for the first time; null data: nothing.
struct Output {
  void* data;
  int64_t bytes;
};

// Makes outputs ready to be written. Returns whether to stream them past the caches: when they would push each other
// out before anyone reads them.
bool prepare_outputs(std::initializer_list<Output> outputs);

}  // namespace inlay::cpu
