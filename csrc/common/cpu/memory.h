// What kernels over large tensors need to know about memory, and to tell it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace inlay::cpu {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Scratch memory, aligned to lines of the cache. Throws std::bad_alloc.
std::unique_ptr<void, Free> make_memory(int64_t bytes);

int64_t last_level_cache_bytes();

// Asks for huge pages under memory that is about to be written for the first time. A freshly allocated tensor of tens
// of megabytes otherwise costs several times more in page faults than in writing it. Does nothing for small sizes.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace inlay::cpu
