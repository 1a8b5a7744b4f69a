// The CUDA side of gdn/params.h for the rule, in chunks or token by token, and for its steps.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "gdn/cuda/aligned.h"
#include "gdn/cuda/chunk.h"
#include "gdn/cuda/recurrent.cuh"
#include "gdn/cuda/scratch.h"

namespace inlay::gdn {
namespace cuda {
namespace {

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
  p.aligned = aligned_rows(in.q) && aligned_rows(in.k) && aligned_rows(in.v) && aligned_state(p.before) &&
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

bool has_16_bits(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

bool in_chunks(const ForwardParams& p) {
  // The matrix products are of 16-bit values. Lengths have no say: packed sequences are what they are alone.
  return has_16_bits(p.inputs.q.dtype) && p.mode != Mode::recurrent;
}

void check_dtypes(const BackwardParams& p) {
  const DType dtype = p.inputs.q.dtype;
  if (!has_16_bits(dtype)) {
    throw std::runtime_error(std::string("gated_delta_rule_bwd: q must be bfloat16 or float16 on CUDA, got ") +
                             name_of(dtype));
  }
  if (p.dout.dtype != dtype) {
    throw std::runtime_error(std::string("gated_delta_rule_bwd: dout must be q's ") + name_of(dtype) +
                             " on CUDA, got " + name_of(p.dout.dtype));
  }
}

// Calls use(a value of q's type, the number of K's columns that kernels are made for).
template <class Use>
void with_chunk_types(const Inputs& inputs, Use use) {
  const auto with_keys = [&](auto type) {
    if (inputs.key_dim <= 64) return use(type, std::integral_constant<int, 64>());
    if (inputs.key_dim <= 128) return use(type, std::integral_constant<int, 128>());
    return use(type, std::integral_constant<int, 256>());
  };
  if (inputs.q.dtype == DType::bf16) return with_keys(__nv_bfloat16());
  return with_keys(__half());
}

}  // namespace
}  // namespace cuda

int64_t scratch_elements(const ForwardParams& params) {
  return cuda::in_chunks(params) ? cuda::ChunkScratch(params.inputs, nullptr).bytes / 4 : 0;
}

int64_t scratch_elements(const BackwardParams& params) {
  cuda::check_dtypes(params);
  return cuda::BackwardScratch(params.inputs, nullptr).bytes / 4;
}

void forward(const ForwardParams& params, void* stream) {
  if (cuda::in_chunks(params)) {
    return cuda::with_chunk_types(params.inputs, [&](auto type, auto keys) {
      cuda::chunk_forward<decltype(type), decltype(keys)::value>(params, stream);
    });
  }
  cuda::recurrent({params.inputs, params.o, params.inputs.initial_state, params.final_state, {}, false}, stream);
}

void step(const StepParams& params, void* stream) {
  cuda::recurrent({params.inputs, params.o, params.state, params.state, params.states_out, false}, stream);
}

void backward(const BackwardParams& params, void* stream) {
  cuda::with_chunk_types(params.inputs, [&](auto type, auto keys) {
    cuda::chunk_backward<decltype(type), decltype(keys)::value>(params, stream);
  });
}

}  // namespace inlay::gdn
