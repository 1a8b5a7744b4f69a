// Where eager code rounds to a 16-bit dtype, for ops that give its numbers. docs/numerics.md says more.
#pragma once

#include <cstdint>

namespace inlay {

// Mirrored by python/inlay/ops/_rounding.py.
enum class Rounding : int32_t {
  once,      // at the end
  stepwise,  // after every step, to what type promotion gives
};

}  // namespace inlay
