// Forward of the rope family over a vector type. A token's angles are widened once for all its heads; each head is read
// once to take its mean square and once more, from the cache, to be normalised and rotated. The maths is in
// python/inlay/ops/rope.py.
#pragma once

#include "rope/cpu/common_impl.h"

namespace inlay::rope {
namespace {

// v rounded to T, where asked.
template <class T, class Vec>
INLAY_INLINE Vec round_if(bool rounds, Vec v) {
  return rounds ? Rounder<Vec, T>(DType::f32)(v) : v;
}

template <class Vec, class T, bool normalises, bool interleaved>
void rotate_heads(const ForwardParams& p, const ForwardSide& side, int64_t batch, int64_t token,
                  const Scratch<typename Vec::Scalar>& scratch, const typename Vec::Scalar* weight, bool stream) {
  using Scalar = typename Vec::Scalar;
  const int64_t half = p.half();
  const T* x = static_cast<const T*>(side.x.data) + side.x.offset(batch, token, 0);
  const int64_t first_row = (batch * p.tokens + token) * side.heads;
  for (int64_t head = 0; head < side.heads; ++head) {
    const T* row = x + head * side.x.head_stride;
    const RowWriter<Vec, T> y(side.y, first_row + head, p.width, stream);
    Vec factor = Vec::set(1);
    if constexpr (normalises) {
      const T* next = row + (head + 1 < side.heads ? side.x.head_stride : 0);
      Accumulator<Vec> squares;
      const auto add_square = [&](int64_t i, auto lanes, int part) {
        __builtin_prefetch(next + i);
        const Vec v = Vec::load(row + i, lanes);
        squares.add_product(v, v, part);
      };
      sweep_sums<Vec>(p.width, add_square, squares);
      const Scalar mean = squares.total() / static_cast<Scalar>(p.width);
      factor = Vec::set(1 / square_root(mean + static_cast<Scalar>(p.eps)));
    }
    const auto value = [&](int64_t i, auto lanes) {
      Vec v = Vec::load(row + i, lanes);
      if constexpr (normalises) {
        v = round_if<T>(side.rounds_normalised, v * factor) * Vec::load(weight + i, lanes);
        v = round_if<T>(side.rounds_weighted, v);
      }
      return v;
    };
    const auto rotated = [&](int64_t i, auto lanes, Vec v, Vec partner) {
      const Vec own = round_if<T>(side.rounds_products, v * Vec::load(scratch.cos + i, lanes));
      return own + round_if<T>(side.rounds_products, partner * Vec::load(scratch.sin + i, lanes));
    };
    if constexpr (interleaved) {
      sweep<Vec>(p.rotary, [&](int64_t i, auto lanes) {
        const Vec v = value(i, lanes);
        y.store(i, rotated(i, lanes, v, Vec::swap_pairs(v)), lanes);
      });
    } else {
      sweep<Vec>(half, [&](int64_t i, auto lanes) {
        const Vec first = value(i, lanes), second = value(half + i, lanes);
        y.store(i, rotated(i, lanes, first, second), lanes);
        y.store(half + i, rotated(half + i, lanes, second, first), lanes);
      });
    }
    sweep<Vec>(p.width - p.rotary,
               [&](int64_t i, auto lanes) { y.store(p.rotary + i, value(p.rotary + i, lanes), lanes); });
  }
}

template <class Vec>
void forward(const ForwardParams& p, int64_t begin, int64_t end, void* memory, bool stream) {
  const auto scratch = make_scratch<Vec>(p, p.q.weight, p.k.weight, static_cast<typename Vec::Scalar*>(memory));
  stream = stream && has_whole_vectors<Vec>(p);
  with_kernel<Vec>(p, [&](auto type, auto normalises, auto interleaved) {
    using T = typename decltype(type)::type;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t batch = index / p.tokens, token = index % p.tokens;
      load_angles<Vec>(p, batch, token, scratch);
      constexpr auto rotate = rotate_heads<Vec, T, decltype(normalises)::value, decltype(interleaved)::value>;
      rotate(p, p.q, batch, token, scratch, scratch.q_weight, stream);
      rotate(p, p.k, batch, token, scratch, scratch.k_weight, stream);
    }
  });
  if (stream) Vec::stream_fence();
}

}  // namespace
}  // namespace inlay::rope
