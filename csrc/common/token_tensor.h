// What bindings do with tensors [B, T, H, ...] and with cumulative sequence lengths.
#pragma once

#include <initializer_list>

#include "common/sequences.h"
#include "common/tensor.h"

namespace inlay {

// `<op>: <argument> must have shape [...] (<names>), got [...]` unless the sizes are these.
void check_shape(const TensorInfo& tensor, std::initializer_list<int64_t> sizes, const char* names);

// A tensor [B, T, H, D], whose last dimension must be dense, or [B, T, H]; any other strides.
TokenTensor token_tensor(const TensorInfo& tensor);

// One sequence a batch row, or those that `cu_seqlens` marks off: [N + 1] int32 or int64 on the device of `reference`,
// a tensor [B, T, ...] whose B is then 1. The offsets themselves are not looked at.
Sequences sequences_of(const char* op, const OptionalTensor& cu_seqlens, const TensorInfo& reference,
                       const char* name = "cu_seqlens");

}  // namespace inlay
