#include "common/cpu/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

namespace inlay::cpu {

namespace {

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    constexpr int64_t kGuess = int64_t{32} << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
    const int64_t reported = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return reported > 0 ? reported : kGuess;
#else
    return kGuess;
#endif
  }();
  return bytes;
}

// Asks for huge pages. A freshly allocated tensor of tens of megabytes otherwise costs several times more in page
// faults than in writing it. Does nothing for small sizes.
void prefer_huge_pages(void* data, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kHugePage = int64_t{2} << 20;
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // A wish: kernels without huge pages refuse it, and nothing is lost.
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

std::unique_ptr<void, Free> make_memory(int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  std::unique_ptr<void, Free> memory(
      std::aligned_alloc(kLineBytes, (bytes + kLineBytes - 1) / kLineBytes * kLineBytes));
  if (!memory) throw std::bad_alloc();
  return memory;
}

bool prepare_outputs(std::initializer_list<Output> outputs) {
  int64_t total = 0;
  for (const Output& output : outputs) {
    if (!output.data) continue;
    prefer_huge_pages(output.data, output.bytes);
    total += output.bytes;
  }
  return total > last_level_cache_bytes() / 2;
}

}  // namespace inlay::cpu
