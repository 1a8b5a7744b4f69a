// What can be known about cumulative sequence lengths without waiting for a device.
#pragma once

#include <cstdint>

#include "common/check.h"

namespace inlay::cpu {

// `<op>: <name> must ...` unless at(0) to at(count) lead from 0 to `tokens` and do not decrease.
template <class At>
void check_offsets(const char* op, const char* name, int64_t count, int64_t tokens, const At& at) {
  int64_t previous = 0;
  for (int64_t i = 0; i <= count; ++i) {
    const int64_t offset = at(i);
    INLAY_CHECK(i > 0 || offset == 0, op, ": ", name, " must start with 0, got ", offset);
    INLAY_CHECK(offset >= previous, op, ": ", name, " must not decrease, got ", offset, " after ", previous);
    previous = offset;
  }
  INLAY_CHECK(previous == tokens, op, ": ", name, " must end with the number of tokens ", tokens, ", got ", previous);
}

}  // namespace inlay::cpu
