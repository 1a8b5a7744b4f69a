// What the backward knows of a row of queries before its products.
#pragma once

#include "attention/params.h"
#include "common/cuda/sigmoid.cuh"
#include "common/cuda/vector.cuh"

namespace inlay::attention::cuda {

using namespace inlay::cuda;

template <typename T>
__device__ Packed<T, 8> load_eight(const T* from) {
  if ((reinterpret_cast<uintptr_t>(from) & 15) == 0) return load<T, 8>(from);
  Packed<T, 8> piece;
#pragma unroll
  for (int i = 0; i < 8; ++i) piece.values[i] = from[i];
  return piece;
}

// delta = <dO, O>, where dO is what came of y, times sigmoid(gate), which goes to `dout` as products will know it;
// dgate = dy O sigmoid'(gate). By `lanes` neighbouring lanes, a power of two.
template <typename T>
__device__ __forceinline__ float row_delta(const BackwardParams& p, void* dout, int64_t batch, int64_t token,
                                           int64_t head, int lane, int lanes) {
  const Inputs& in = p.inputs;
  const int columns = static_cast<int>(in.value_dim);
  const T* const dy = static_cast<const T*>(p.dout.data) + p.dout.offset(batch, token, head);
  const T* const o = static_cast<const T*>(p.o.data) + p.o.offset(batch, token, head);
  const int64_t row = (batch * in.queries.tokens + token) * in.query_heads + head;  // of contiguous tensors
  float delta = 0.0f;
  for (int column = lane * 8; column < columns; column += lanes * 8) {
    float result[8], gradient[8];
    unpack(load_eight(o + column), result);
    unpack(load_eight(dy + column), gradient);
    if (in.gate.data) {
      float gate[8], dgate[8];
      unpack(load_eight(static_cast<const T*>(in.gate.data) + in.gate.offset(batch, token, head) + column), gate);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float open = sigmoid<T>(gate[i]);
        dgate[i] = gradient[i] * result[i] * (open * (1.0f - open));
        gradient[i] = to_float(from_float<T>(gradient[i] * open));
      }
      const int64_t to = row * columns + column;
      store(static_cast<T*>(p.dgate.data) + to, pack<T>(dgate));
      store(static_cast<T*>(dout) + to, pack<T>(gradient));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) delta += result[i] * gradient[i];
  }
  for (int other = lanes / 2; other > 0; other /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, other);
  return delta;
}

}  // namespace inlay::attention::cuda
