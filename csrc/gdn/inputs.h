// What the bindings of the gated delta rule share: the checks of its inputs.
#pragma once

#include <utility>

#include "common/token_tensor.h"
#include "gdn/params.h"

namespace inlay::gdn {

void check_dtype(const TensorInfo& tensor, DType first, DType second);
// States are kept in float32 (float64 for float64 inputs), or in bfloat16 at half the memory.
void check_state_dtype(const char* op, const char* name, DType state, DType dtype);
// [N, Hv, K, V] with every [K, V] dense. The pointer is written through only where the schema says so.
StateTensor state_tensor(const TensorInfo& tensor, const Inputs& inputs, const TensorInfo& q);

// The same of a state that is updated in place: what is written must not overlap itself.
StateTensor updated_state(const TensorInfo& tensor, const Inputs& inputs, const TensorInfo& q);
// `states_out` of a step: [B, T, Hv, K, V], contiguous, like `state`; absent: not wanted.
OutputTensor states_of_tokens(const OptionalTensor& states_out, const Inputs& inputs, const TensorInfo& state,
                              const TensorInfo& q);
// K or V: the size of one of the tensor's dimensions.
void check_head_dim(const TensorInfo& tensor, const char* dimension, int64_t size);

struct InputTensors {
  const Tensor& q;
  const Tensor& k;
  const Tensor& v;
  const Tensor& g;
  const Tensor& beta;
};

// What the ops of the rule have in common. `q` is the info of tensors.q.
Inputs checked_inputs(const TensorInfo& q, const InputTensors& tensors, const OptionalTensor& initial_state,
                      const OptionalTensor& cu_seqlens, double scale, bool l2norm_qk);
// A contiguous [N, Hv, K, V] where it is wanted, else [0].
std::pair<Tensor, StateTensor> empty_states(bool wanted, DType dtype, const Inputs& inputs, const TensorInfo& q);

}  // namespace inlay::gdn
