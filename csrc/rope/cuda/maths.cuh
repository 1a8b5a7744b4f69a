// What the register kernels share: which vectors of a head a thread holds, its angles, and conversions.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/vector.cuh"
#include "rope/cuda/config.h"
#include "rope/params.h"

namespace inlay::rope::cuda {

using namespace inlay::cuda;

// The two vectors of a head that a thread holds. Where channels are rotated in halves, the first `half` threads hold a
// vector of each half, partners of each other, and the threads after them those that pass, neighbours side by side.
template <typename T, int kGroup, bool kInterleaved>
struct Share {
  static constexpr int kLanes = kPerAccess<T>;

  __device__ explicit Share(const Problem& p) {
    const int lane = threadIdx.x % kGroup;
    const int pairs = static_cast<int>(p.width) / (2 * kLanes);
    const int half = kInterleaved ? 0 : static_cast<int>(p.rotary) / (2 * kLanes);
    const bool partners = lane < half;
    owns = lane < pairs;
    channel[0] = (partners ? lane : lane + half) * kLanes;
    channel[1] = channel[0] + (partners ? half : pairs - half) * kLanes;
#pragma unroll
    for (int j = 0; j < 2; ++j) rotates[j] = owns && (kInterleaved ? channel[j] < p.rotary : partners);
  }

  int channel[2];  // the first of each vector
  bool owns;       // whether the thread holds anything
  bool rotates[2];
};

// kLanes angles of the channels from `channel` on, in the table's own dtype.
template <typename C, int kLanes, bool kInterleaved>
__device__ inline Packed<C, kLanes> load_angles(const Problem& p, const void* row, int channel) {
  const C* const source = static_cast<const C*>(row) + p.angle_column(channel);
  if constexpr (kInterleaved) {
    if (p.one_angle_per_pair) {
      const Packed<C, kLanes / 2> pairs = load<C, kLanes / 2>(source);
      Packed<C, kLanes> angles;
#pragma unroll
      for (int i = 0; i < kLanes; ++i) angles.values[i] = pairs.values[i / 2];
      return angles;
    }
  }
  return load<C, kLanes>(source);
}

// As unpack(), in one instruction for each bfloat16: there the compiler first takes words apart.
template <typename T, int N>
__device__ inline void widen(const Packed<T, N>& packed, float (&values)[N]) {
  if constexpr (kDType<T> == DType::bf16) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t pair = reinterpret_cast<const uint32_t*>(&packed)[i];
      values[2 * i] = __uint_as_float(pair << 16);
      values[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  } else {
    unpack(packed, values);
  }
}

// A thread's cos and sin in the tables' dtype.
template <typename C, int kLanes, bool kInterleaved>
struct Angles {
  Packed<C, kLanes> cos[2];
  Packed<C, kLanes> sin[2];

  template <typename Share>
  __device__ void load(const Problem& p, const Share& share, int64_t batch, int64_t token) {
    const C* const cos_row = static_cast<const C*>(p.cos.data) + p.cos.offset(batch, token);
    const C* const sin_row = static_cast<const C*>(p.sin.data) + p.sin.offset(batch, token);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!share.rotates[j]) continue;
      cos[j] = load_angles<C, kLanes, kInterleaved>(p, cos_row, share.channel[j]);
      sin[j] = load_angles<C, kLanes, kInterleaved>(p, sin_row, share.channel[j]);
    }
  }

  // Makes the compiler widen 16-bit angles anew for their next use.
  __device__ void keep_packed() {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      inlay::cuda::keep_packed(cos[j]);
      inlay::cuda::keep_packed(sin[j]);
    }
  }

  __device__ void widen_to(Angles<float, kLanes, kInterleaved>& wide) const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      widen(cos[j], wide.cos[j].values);
      widen(sin[j], wide.sin[j].values);
    }
  }

  // Makes sin negative for the first channel of each pair: then y = m cos + partner sin for both.
  __device__ void negate_first() {
#pragma unroll
    for (int j = 0; j < (kInterleaved ? 2 : 1); ++j) {
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(sin[j]) / 4); ++i) {
        uint32_t& word = reinterpret_cast<uint32_t*>(&sin[j])[i];
        if constexpr (sizeof(C) == 2) {
          word ^= kInterleaved ? 0x8000u : 0x80008000u;
        } else if (!kInterleaved || i % 2 == 0) {
          word ^= 0x80000000u;
        }
      }
    }
  }
};

// Neighbours change places.
template <typename T, int N>
__device__ inline Packed<T, N> swap_pairs(const Packed<T, N>& packed) {
  static_assert(sizeof(T) == 2);
  Packed<T, N> swapped;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const uint32_t pair = reinterpret_cast<const uint32_t*>(&packed)[i];
    reinterpret_cast<uint32_t*>(&swapped)[i] = __funnelshift_l(pair, pair, 16);
  }
  return swapped;
}

// weight + offset of a thread's channels.
template <typename Share>
__device__ inline void load_weights(const Problem& p, const VectorTensor& weight, const Share& share,
                                    float (&values)[2][Share::kLanes]) {
  if (!share.owns) return;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    load_as_float(weight.data, weight.dtype, share.channel[j], values[j]);
#pragma unroll
    for (int i = 0; i < Share::kLanes; ++i) values[j][i] += static_cast<float>(p.weight_offset);
  }
}

}  // namespace inlay::rope::cuda
