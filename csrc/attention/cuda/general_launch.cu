// The general kernels by dtype.
#include "attention/cuda/general_division.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace inlay::attention::cuda {
namespace {

// Calls body(an element of T).
template <typename Body>
void with_element(DType dtype, Body body) {
  if (dtype == DType::bf16) {
    body(__nv_bfloat16());
  } else if (dtype == DType::f16) {
    body(__half());
  } else {
    body(float());
  }
}

}  // namespace

void general_forward(const ForwardParams& params, void* stream) {
  with_element(params.inputs.q.dtype, [&](auto element) { general_forward<decltype(element)>(params, stream); });
}

void general_backward(const BackwardParams& params, void* stream) {
  with_element(params.inputs.q.dtype, [&](auto element) { general_backward<decltype(element)>(params, stream); });
}

int64_t general_scratch_bytes(const ForwardParams& params) { return MaskCells(params.inputs, nullptr).bytes; }

int64_t general_scratch_bytes(const BackwardParams& params) {
  int64_t bytes = 0;
  with_element(params.inputs.q.dtype, [&](auto element) {
    const Division division = backward_division<decltype(element), GeneralRole::keys>(params.inputs);
    check_division(division);
    bytes = GeneralScratch(params.inputs, division.streamed, nullptr).bytes;
  });
  return bytes;
}

}  // namespace inlay::attention::cuda
