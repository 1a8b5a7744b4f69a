// What the vector types (vec_*.h) have in common: element types in memory, and how many lanes to touch.
//
// Rule for every header that a tier's source includes: functions are templates or static functions in an anonymous
// namespace, and nothing of std:: that has code. A function with external linkage would be compiled once per
// instruction set and merged by the linker, which may keep the copy that this machine cannot run.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#define INLAY_INLINE [[gnu::always_inline]] inline

namespace inlay::cpu {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// How many lanes a load or store touches. The other lanes of a partial load are zero.
struct Full {};
struct Partial {
  int64_t count;  // 1 to lanes - 1
};

}  // namespace inlay::cpu
