// What the conv kernels share.
#pragma once

#include "common/cpu/dispatch.h"
#include "common/cpu/row_access.h"
#include "common/cpu/sweep.h"
#include "common/cpu/vec_math.h"
#include "conv/cpu/kernels.h"

namespace inlay::conv {
namespace {

using namespace inlay::cpu;

template <int64_t count>
struct Count {
  static constexpr int64_t value = count;
};

// A store, past the caches where asked: the address must then be aligned to the vector.
template <class Vec, class T>
INLAY_INLINE void store(T* target, Vec v, Full lanes, bool stream) {
  if (stream) {
    Vec::stream(target, v);
  } else {
    Vec::store(target, v, lanes);
  }
}
template <class Vec, class T>
INLAY_INLINE void store(T* target, Vec v, Partial lanes, bool) {
  Vec::store(target, v, lanes);
}

// z rounded, where eager code rounds it, and activated.
template <class Vec, class T>
INLAY_INLINE Vec activate(Activation activation, bool rounds, Vec z) {
  if (activation == Activation::none) return z;  // storing rounds
  if (rounds) z = Rounder<Vec, T>(DType::f32)(z);
  return z * sigmoid(z);
}

// The gradient of z from that of act(z).
template <class Vec>
INLAY_INLINE Vec through_activation(Activation activation, Vec upstream, Vec z) {
  if (activation == Activation::none) return upstream;
  const Vec one = Vec::set(1);
  const Vec s = sigmoid(z);
  return upstream * s * fma(z, one - s, one);
}

// out[k][i] = weight[channel + i][k], and the bias, 0 where there is none.
template <class Vec>
void load_weights(const VectorTensor& weight, const VectorTensor& bias, int64_t width, int64_t channel, int64_t count,
                  Scratch<typename Vec::Scalar>& scratch) {
  using Scalar = typename Vec::Scalar;
  with_element_type<Vec>(weight.dtype, [&](auto type) {
    using W = typename decltype(type)::type;
    const W* source = static_cast<const W*>(weight.data) + channel * width;
    for (int64_t first = 0; first < count * width; first += kChannelBlock) {
      Scalar flat[kChannelBlock];
      const int64_t length = smaller(kChannelBlock, count * width - first);
      sweep<Vec>(length,
                 [&](int64_t i, auto lanes) { Vec::store(flat + i, Vec::load(source + first + i, lanes), lanes); });
      int64_t i = first / width;
      int64_t k = first % width;
      for (int64_t j = 0; j < length; ++j) {
        scratch.weight[k][i] = flat[j];
        if (++k == width) {
          k = 0;
          ++i;
        }
      }
    }
  });
  sweep<Vec>(count, [&](int64_t i, auto lanes) { Vec::store(scratch.bias + i, Vec::set(0), lanes); });
  if (!bias.data) return;
  with_element_type<Vec>(bias.dtype, [&](auto type) {
    using B = typename decltype(type)::type;
    const B* source = static_cast<const B*>(bias.data) + channel;
    sweep<Vec>(count,
               [&](int64_t i, auto lanes) { Vec::store(scratch.bias + i, Vec::load(source + i, lanes), lanes); });
  });
}

// target[i] = source[i * stride].
template <class T>
void gather(const T* source, int64_t stride, int64_t count, T* target) {
  for (int64_t i = 0; i < count; ++i) target[i] = source[i * stride];
}

// Partial sums of a group of tokens: a row for each weight, then one for the bias; null: not wanted.
template <class Scalar>
struct Sums {
  Scalar* dweight;
  Scalar* dbias;
};

template <class Scalar>
Sums<Scalar> sums_of(const BackwardParams& p, int64_t group) {
  Scalar* sums = static_cast<Scalar*>(p.partials) + group * p.sums() * p.channels;
  return {p.dweight.data ? sums : nullptr, p.dbias.data ? sums + (p.sums() - 1) * p.channels : nullptr};
}

}  // namespace
}  // namespace inlay::conv
