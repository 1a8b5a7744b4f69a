// The launchers of the rule in chunks, one for each kind of kernel: compiled in files of their own.
#pragma once

#include "gdn/params.h"

namespace inlay::gdn::cuda {

// Shared memory that a block must be able to have. Mirrored by python/inlay/ops/gdn/rule.py.
inline constexpr int kChunkSharedBytes = 227 * 1024;

// For q of 16-bit type T with at most kKeys columns: 64, 128 or 256.
template <typename T, int kKeys>
void chunk_forward(const ForwardParams& params, void* stream);
template <typename T, int kKeys>
void chunk_backward(const BackwardParams& params, void* stream);

}  // namespace inlay::gdn::cuda
