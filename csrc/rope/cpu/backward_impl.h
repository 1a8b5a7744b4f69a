// Backward of the rope family over a vector type. Per head, with n = x * rstd, w = weight + offset:
//
//   dm = dy turned back: dm = dy cos + (dy sin) of the partner, sin negative for the first channel of a pair
//   dx = rstd * (g - n * mean(g n)),  g = dm * w          where there is no norm, dx = dm
//   dweight += dm * n
//
// The first sweep turns dy back and takes the sums, rstd's among them; the second one makes dx from what is in the
// cache.
#pragma once

#include "common/cpu/partial_sums.h"
#include "rope/cpu/common_impl.h"

namespace inlay::rope {
namespace {

template <class Vec, class T, bool normalises, bool interleaved>
void turn_heads_back(const BackwardParams& p, const BackwardSide& side, int64_t batch, int64_t token,
                     const Scratch<typename Vec::Scalar>& scratch, const typename Vec::Scalar* weight,
                     typename Vec::Scalar* turned, typename Vec::Scalar* dweight, bool stream) {
  using Scalar = typename Vec::Scalar;
  const int64_t half = p.half();
  const T* first_dy = static_cast<const T*>(side.dy.data) + side.dy.offset(batch, token, 0);
  const T* first_x = static_cast<const T*>(side.x.data) + side.x.offset(batch, token, 0);
  const int64_t first_row = (batch * p.tokens + token) * side.heads;
  for (int64_t head = 0; head < side.heads; ++head) {
    const T* dy = first_dy + head * side.dy.head_stride;
    const T* x = first_x + head * side.x.head_stride;
    const bool more = head + 1 < side.heads;
    const T* next_dy = more ? dy + side.dy.head_stride : dy;
    const T* next_x = more ? x + side.x.head_stride : x;
    const RowWriter<Vec, T> dx(side.dx, first_row + head, p.width, stream);

    Accumulator<Vec> squares;  // of x
    Accumulator<Vec> dot;      // of g and x
    const auto take = [&](int64_t i, auto lanes, int part, Vec dm) {
      if constexpr (normalises) {
        __builtin_prefetch(next_dy + i);
        __builtin_prefetch(next_x + i);
        const Vec v = Vec::load(x + i, lanes);
        Vec::store(turned + i, dm, lanes);
        squares.add_product(v, v, part);
        dot.add_product(dm * Vec::load(weight + i, lanes), v, part);
      } else {
        dx.store(i, dm, lanes);
      }
    };
    const auto times = [](Vec v, const Scalar* angles, auto lanes) { return v * Vec::load(angles, lanes); };
    if constexpr (interleaved) {
      const auto turn = [&](int64_t i, auto lanes, int part) {
        const Vec v = Vec::load(dy + i, lanes);
        const Vec crossed = Vec::swap_pairs(times(v, scratch.sin + i, lanes));
        take(i, lanes, part, fma(v, Vec::load(scratch.cos + i, lanes), crossed));
      };
      sweep_sums<Vec>(p.rotary, turn, squares, dot);
    } else {
      const auto turn = [&](int64_t i, auto lanes, int part) {
        const Vec first = Vec::load(dy + i, lanes), second = Vec::load(dy + half + i, lanes);
        const Vec own = times(first, scratch.cos + i, lanes);
        const Vec second_own = times(second, scratch.cos + half + i, lanes);
        take(i, lanes, part, fma(second, Vec::load(scratch.sin + half + i, lanes), own));
        take(half + i, lanes, part, fma(first, Vec::load(scratch.sin + i, lanes), second_own));
      };
      sweep_sums<Vec>(half, turn, squares, dot);
    }
    const auto pass = [&](int64_t i, auto lanes, int part) {
      take(p.rotary + i, lanes, part, Vec::load(dy + p.rotary + i, lanes));
    };
    sweep_sums<Vec>(p.width - p.rotary, pass, squares, dot);
    if constexpr (!normalises) continue;

    const Scalar width = static_cast<Scalar>(p.width);
    const Scalar rstd = 1 / square_root(squares.total() / width + static_cast<Scalar>(p.eps));
    const Vec factor = Vec::set(rstd);
    const Vec minus_mean_dot = Vec::set(-(dot.total() * rstd / width));
    sweep<Vec>(p.width, [&](int64_t i, auto lanes) {
      const Vec dm = Vec::load(turned + i, lanes);
      const Vec n = Vec::load(x + i, lanes) * factor;
      const Vec g = dm * Vec::load(weight + i, lanes);
      dx.store(i, fma(n, minus_mean_dot, g) * factor, lanes);
      if (dweight) Vec::store(dweight + i, fma(dm, n, Vec::load(dweight + i, lanes)), lanes);
    });
  }
}

template <class Vec>
void backward(const BackwardParams& p, int64_t begin, int64_t end, int64_t groups, void* memory, bool stream) {
  using Scalar = typename Vec::Scalar;
  const auto scratch = make_scratch<Vec>(p, p.q.weight, p.k.weight, static_cast<Scalar*>(memory));
  Scalar* turned = static_cast<Scalar*>(memory) + (kBackwardScratch - 1) * p.width;
  stream = stream && (p.normalises || has_whole_vectors<Vec>(p));
  const int64_t tokens = p.batch * p.tokens;
  const auto empty_sums = [&](const BackwardSide& side, int64_t group) -> Scalar* {
    if (!side.partials) return nullptr;
    Scalar* sums = static_cast<Scalar*>(side.partials) + group * p.width;
    for (int64_t i = 0; i < p.width; ++i) sums[i] = 0;
    return sums;
  };
  with_kernel<Vec>(p, [&](auto type, auto normalises, auto interleaved) {
    using T = typename decltype(type)::type;
    constexpr auto turn_back = turn_heads_back<Vec, T, decltype(normalises)::value, decltype(interleaved)::value>;
    for (int64_t group = begin; group < end; ++group) {
      Scalar* q_sums = empty_sums(p.q, group);
      Scalar* k_sums = empty_sums(p.k, group);
      const int64_t last = group_begin(tokens, groups, group + 1);
      for (int64_t index = group_begin(tokens, groups, group); index < last; ++index) {
        const int64_t batch = index / p.tokens, token = index % p.tokens;
        load_angles<Vec>(p, batch, token, scratch);
        turn_back(p, p.q, batch, token, scratch, scratch.q_weight, turned, q_sums, stream);
        turn_back(p, p.k, batch, token, scratch, scratch.k_weight, turned, k_sums, stream);
      }
    }
  });
  if (stream) Vec::stream_fence();
}

template <class Vec>
void sum_partials(const BackwardSide& side, int64_t width, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  const RowWriter<Vec, typename AnyFor<Scalar>::type> writer(side.dweight, 0, width, false);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kSumBlock;
    const int64_t count = smaller(kSumBlock, width - first);
    Scalar totals[kSumBlock];
    add_groups(static_cast<const Scalar*>(side.partials) + first, side.partial_rows, width, count, totals);
    sweep<Vec>(count, [&](int64_t i, auto lanes) { writer.store(first + i, Vec::load(totals + i, lanes), lanes); });
  }
}

}  // namespace
}  // namespace inlay::rope
