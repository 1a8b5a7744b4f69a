// The CUDA side of gdn/params.h for the rule over sequences, in chunks or token by token.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda/runtime.h"
#include "gdn/cuda/chunk.h"
#include "gdn/cuda/recurrent.h"
#include "gdn/cuda/scratch.h"

namespace inlay::gdn {
namespace cuda {
namespace {

using namespace inlay::cuda;

bool has_16_bits(DType dtype) { return dtype == DType::bf16 || dtype == DType::f16; }

// Whether a block can have the shared memory that the kernels for chunks take.
bool has_room_for_chunks() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) >= kChunkSharedBytes; }

bool in_chunks(const ForwardParams& p) {
  // The matrix products are of 16-bit values. Lengths have no say: packed sequences are what they are alone.
  return has_16_bits(p.inputs.q.dtype) && p.mode != Mode::recurrent && has_room_for_chunks();
}

void check_backward(const BackwardParams& p) {
  if (!has_room_for_chunks()) {
    throw std::runtime_error(
        "gated_delta_rule_bwd: q must be on a GPU of compute capability 9.0 or 10.0, whose blocks can have 227 KiB of"
        " shared memory");
  }
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
  cuda::check_backward(params);
  return cuda::BackwardScratch(params.inputs, nullptr).bytes / 4;
}

void forward(const ForwardParams& params, void* stream) {
  if (cuda::in_chunks(params)) {
    return cuda::with_chunk_types(params.inputs, [&](auto type, auto keys) {
      cuda::chunk_forward<decltype(type), decltype(keys)::value>(params, stream);
    });
  }
  cuda::recurrent({params.inputs, params.o, params.inputs.initial_state, params.final_state, {}}, stream);
}

void backward(const BackwardParams& params, void* stream) {
  cuda::with_chunk_types(params.inputs, [&](auto type, auto keys) {
    cuda::chunk_backward<decltype(type), decltype(keys)::value>(params, stream);
  });
}

}  // namespace inlay::gdn
