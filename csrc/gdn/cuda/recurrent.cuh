// The gated delta rule token by token:
//
//   u = beta (v - exp(g) S^T k)
//   S <- exp(g) S + k u^T
//   o = scale S^T q
//
// A warp owns 16 columns of one head's state and keeps them in registers, in float32, from the first token to the last:
// eight groups of four lanes, each with kRows rows of K, each lane with four columns. Columns do not depend on each
// other, so that no warp waits for another. A token's sums over K are taken together, all of the state before it
// (S^T q after the token is exp(g) S^T q + u <k, q>), and the next token's inputs are under way meanwhile.
#pragma once

#include <type_traits>

#include "common/cuda/launch.cuh"
#include "common/cuda/vector.cuh"
#include "gdn/params.h"

namespace inlay::gdn::cuda {

using namespace inlay::cuda;

inline constexpr int kLaneColumns = 4;
inline constexpr int kColumnLanes = 4;  // 64 bytes of float32: what memory hands over at once
inline constexpr int kTileColumns = kLaneColumns * kColumnLanes;
inline constexpr int kRowGroups = 32 / kColumnLanes;
inline constexpr int kRecurrentWarps = 2;  // of a block: small blocks, for few sequences and heads

struct RecurrentParams {
  Inputs inputs;
  OutputTensor o;      // [B, T, Hv, V]
  StateTensor before;  // absent: zeros
  StateTensor after;   // may be the same memory, or not wanted
  OutputTensor every;  // [B, T, Hv, K, V], the state after each token; or not wanted
  bool aligned;        // all rows and states start at multiples of 16 bytes
};

// N consecutive elements; not aligned: one by one.
template <typename E, int N>
__device__ inline Packed<E, N> load_packed(const E* source, bool aligned) {
  if (aligned && sizeof(E) * N == 8) {
    Packed<E, N> packed;
    *reinterpret_cast<uint2*>(&packed) = *reinterpret_cast<const uint2*>(source);
    return packed;
  }
  if (aligned) return load<E, N>(source);
  Packed<E, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) packed.values[i] = source[i];
  return packed;
}

template <typename E, int N>
__device__ inline void store_packed(E* target, bool aligned, const Packed<E, N>& packed) {
  if (aligned && sizeof(E) * N == 8) {
    *reinterpret_cast<uint2*>(target) = *reinterpret_cast<const uint2*>(&packed);
  } else if (aligned) {
    store(target, packed);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = packed.values[i];
  }
}

// Calls use(data) with a pointer to the state's dtype.
template <class Use>
__device__ inline void with_state_type(void* data, DType dtype, Use use) {
  if (dtype == DType::bf16) {
    use(static_cast<__nv_bfloat16*>(data));
  } else {
    use(static_cast<float*>(data));
  }
}

inline constexpr int kPart = kHeadDimMultiple;  // rows of K that a lane has or has not, together

// What one token brings to a lane, as it lies in memory.
template <typename T, int kRows>
struct Token {
  Packed<T, kPart> q[kRows / kPart];
  Packed<T, kPart> k[kRows / kPart];
  Packed<T, kLaneColumns> v;
  float g;
  float beta;
};

template <typename T, int kRows>
__global__ void __launch_bounds__(32 * kRecurrentWarps) recurrent_kernel(const __grid_constant__ RecurrentParams p) {
  wait_for_predecessor();
  release_successor();
  const Inputs& inputs = p.inputs;
  const int keys = static_cast<int>(inputs.key_dim), values = static_cast<int>(inputs.value_dim);
  const int tiles = (values + kTileColumns - 1) / kTileColumns;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kRecurrentWarps + threadIdx.x / 32;
  const int64_t head_number = warp / tiles;
  const int64_t sequence_number = head_number / inputs.value_heads;
  if (sequence_number >= inputs.sequences.count) return;
  const int head = static_cast<int>(head_number - sequence_number * inputs.value_heads);
  const int key_head = head / static_cast<int>(inputs.group());
  const int lane = threadIdx.x % 32;
  const int first_row = lane / kColumnLanes * kRows;
  const int column = static_cast<int>(warp - head_number * tiles) * kTileColumns + lane % kColumnLanes * kLaneColumns;
  const bool has_column = column < values;
  const auto has_rows = [&](int part) { return first_row + part * kPart < keys; };
  const Sequence sequence = inputs.sequences[sequence_number];

  // This lane's part of a state [K, V].
  const auto for_rows = [&](auto use) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (has_column && has_rows(r / kPart)) use(r, static_cast<int64_t>(first_row + r) * values + column);
    }
  };
  float state[kRows][kLaneColumns] = {};
  const auto load_state = [&](const StateTensor& from) {
    with_state_type(from.data, from.dtype, [&](const auto* data) {
      using E = std::remove_cv_t<std::remove_reference_t<decltype(*data)>>;
      data += from.offset(sequence_number, head);
      for_rows(
          [&](int r, int64_t offset) { unpack(load_packed<E, kLaneColumns>(data + offset, p.aligned), state[r]); });
    });
  };
  const auto store_state = [&](void* to, DType dtype, int64_t start) {
    with_state_type(to, dtype, [&](auto* data) {
      using E = std::remove_reference_t<decltype(*data)>;
      data += start;
      for_rows([&](int r, int64_t offset) { store_packed(data + offset, p.aligned, pack<E>(state[r])); });
    });
  };
  if (p.before.data) load_state(p.before);

  const auto load_token = [&](int64_t index, Token<T, kRows>& token) {
    const auto load_keys = [&](const TokenTensor& tensor, auto& row) {
      const T* const source = static_cast<const T*>(tensor.data) + tensor.offset(sequence.batch, index, key_head);
#pragma unroll
      for (int part = 0; part < kRows / kPart; ++part) {
        if (has_rows(part)) row[part] = load_packed<T, kPart>(source + first_row + part * kPart, p.aligned);
      }
    };
    load_keys(inputs.q, token.q);
    load_keys(inputs.k, token.k);
    if (has_column) {
      const T* const source = static_cast<const T*>(inputs.v.data) + inputs.v.offset(sequence.batch, index, head);
      token.v = load_packed<T, kLaneColumns>(source + column, p.aligned);
    }
    token.g = static_cast<const float*>(inputs.g.data)[inputs.g.offset(sequence.batch, index, head)];
    float beta[1];
    load_as_float(inputs.beta.data, inputs.beta.dtype, inputs.beta.offset(sequence.batch, index, head), beta);
    token.beta = beta[0];
  };

  Token<T, kRows> token{};  // what this lane has no part in stays zero
  if (sequence.begin < sequence.end) load_token(sequence.begin, token);
  for (int64_t index = sequence.begin; index < sequence.end; ++index) {
    const Token<T, kRows> now = token;
    if (index + 1 < sequence.end) load_token(index + 1, token);

    // <S, k> and <S, q> of four columns each, <k, k>, <q, q>, <k, q>
    float sums[2 * kLaneColumns + 3] = {};
#pragma unroll
    for (int part = 0; part < kRows / kPart; ++part) {
      float q[kPart], k[kPart];
      unpack(now.q[part], q);
      unpack(now.k[part], k);
#pragma unroll
      for (int r = 0; r < kPart; ++r) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          sums[i] += state[part * kPart + r][i] * k[r];
          sums[kLaneColumns + i] += state[part * kPart + r][i] * q[r];
        }
        sums[2 * kLaneColumns] += k[r] * k[r];
        sums[2 * kLaneColumns + 1] += q[r] * q[r];
        sums[2 * kLaneColumns + 2] += k[r] * q[r];
      }
    }
#pragma unroll
    for (int offset = kColumnLanes; offset < 32; offset *= 2) {
#pragma unroll
      for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    }
    const auto inverse_length = [&](float square_sum) {
      return inputs.l2norm_qk ? 1.0f / sqrtf(square_sum + static_cast<float>(kL2Eps)) : 1.0f;
    };
    const float k_factor = inverse_length(sums[2 * kLaneColumns]);
    const float q_factor = inverse_length(sums[2 * kLaneColumns + 1]);
    const float dot = sums[2 * kLaneColumns + 2] * k_factor * q_factor;
    const float decay = expf(now.g);
    const float scale = static_cast<float>(inputs.scale);
    float v[kLaneColumns];
    unpack(now.v, v);
    float update[kLaneColumns], o[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      update[i] = now.beta * (v[i] - decay * (k_factor * sums[i]));
      o[i] = scale * (decay * (q_factor * sums[kLaneColumns + i]) + update[i] * dot);
      update[i] *= k_factor;
    }
#pragma unroll
    for (int part = 0; part < kRows / kPart; ++part) {
      float k[kPart];
      unpack(now.k[part], k);
#pragma unroll
      for (int r = 0; r < kPart; ++r) {
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
          float& entry = state[part * kPart + r][i];
          entry = decay * entry + k[r] * update[i];
        }
      }
    }

    const int64_t row = (sequence.batch * inputs.sequences.tokens + index) * inputs.value_heads + head;
    if (first_row == 0 && has_column) {
      store_packed(static_cast<T*>(p.o.data) + row * values + column, p.aligned, pack<T>(o));
    }
    if (p.every.data) store_state(p.every.data, p.every.dtype, row * keys * values);
  }
  if (p.after.data) store_state(p.after.data, p.after.dtype, p.after.offset(sequence_number, head));
}

}  // namespace inlay::gdn::cuda
