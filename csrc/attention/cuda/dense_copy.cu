// Dense copies of tensors that the copy engine cannot read: unaligned or expanded ones.
#include "attention/cuda/launch.h"
#include "common/cuda/launch.cuh"

namespace inlay::attention::cuda {
namespace {

using namespace inlay::cuda;

struct CopyParams {
  TokenTensor from;
  uint16_t* to;
  int64_t tokens, heads, columns, elements;
};

constexpr int kCopyThreads = 256;

__global__ void copy_kernel(CopyParams p) {
  wait_for_predecessor();
  for (int64_t i = int64_t{blockIdx.x} * kCopyThreads + threadIdx.x; i < p.elements;
       i += int64_t{gridDim.x} * kCopyThreads) {
    const int64_t row = i / p.columns, token = row / p.heads;
    p.to[i] = static_cast<const uint16_t*>(
        p.from.data)[p.from.offset(token / p.tokens, token % p.tokens, row % p.heads) + i % p.columns];
  }
}

}  // namespace

TokenTensor dense_copy(const BoxedTensor& x, void* to, void* stream) {
  const CopyParams params{
      x.tensor, static_cast<uint16_t*>(to), x.tokens, x.heads, x.columns, x.batch * x.tokens * x.heads * x.columns};
  if (params.elements > 0) {
    const auto launch =
        resident_launch<copy_kernel, kCopyThreads, 0, CopyParams>((params.elements + kCopyThreads - 1) / kCopyThreads);
    launch.start(params, launch.blocks, stream);
  }
  TokenTensor copy;
  copy.data = to;
  copy.dtype = x.tensor.dtype;
  copy.head_stride = x.columns;
  copy.token_stride = x.heads * x.columns;
  copy.batch_stride = x.tokens * copy.token_stride;
  return copy;
}

}  // namespace inlay::attention::cuda
