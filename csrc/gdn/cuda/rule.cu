// The CUDA side of gdn/params.h for the rule and its steps: both are the recurrent kernel.
#include <stdexcept>

#include "gdn/cuda/recurrent.cuh"

namespace inlay::gdn {
namespace cuda {
namespace {

bool aligned_pointer(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool aligned_tokens(const TokenTensor& tensor) {
  const int64_t elements = 16 / size_of(tensor.dtype);
  return aligned_pointer(tensor.data) && tensor.batch_stride % elements == 0 && tensor.token_stride % elements == 0 &&
         tensor.head_stride % elements == 0;
}

bool aligned_state(const StateTensor& state) {
  const int64_t elements = 16 / size_of(state.dtype);
  return aligned_pointer(state.data) && state.sequence_stride % elements == 0 && state.head_stride % elements == 0;
}

template <typename T, int kRows>
void launch(const RecurrentParams& p, void* stream) {
  const int64_t tiles = (p.inputs.value_dim + kTileColumns - 1) / kTileColumns;
  const int64_t warps = p.inputs.sequences.count * p.inputs.value_heads * tiles;
  const int64_t blocks = (warps + kRecurrentWarps - 1) / kRecurrentWarps;
  if (blocks == 0) return;
  start<recurrent_kernel<T, kRows>, 32 * kRecurrentWarps>(p, dim3(static_cast<unsigned>(blocks)), stream);
}

template <typename T>
void launch(const RecurrentParams& p, void* stream) {
  if (p.inputs.key_dim <= 8 * kRowGroups) {
    launch<T, 8>(p, stream);
  } else if (p.inputs.key_dim <= 16 * kRowGroups) {
    launch<T, 16>(p, stream);
  } else {
    launch<T, 32>(p, stream);
  }
}

void recurrent(RecurrentParams p, void* stream) {
  static_assert(kMaxHeadDim <= 32 * kRowGroups && kHeadDimMultiple == 8);
  const Inputs& in = p.inputs;
  p.aligned = aligned_tokens(in.q) && aligned_tokens(in.k) && aligned_tokens(in.v) && aligned_state(p.before) &&
              aligned_state(p.after) && aligned_pointer(p.every.data) && aligned_pointer(p.o.data);
  switch (in.q.dtype) {
    case DType::bf16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::f16:
      return launch<__half>(p, stream);
    case DType::f32:
      return launch<float>(p, stream);
    default:
      throw std::runtime_error("inlay: q must be float32, bfloat16 or float16 on CUDA, got float64");
  }
}

}  // namespace
}  // namespace cuda

void forward(const ForwardParams& params, void* stream) {
  cuda::recurrent({params.inputs, params.o, params.inputs.initial_state, params.final_state, {}, false}, stream);
}

void step(const StepParams& params, void* stream) {
  cuda::recurrent({params.inputs, params.o, params.state, params.state, params.states_out, false}, stream);
}

}  // namespace inlay::gdn
