// Forward and backward with the tokens innermost in memory: vectors of tokens, one channel after another.
//
// The inputs of a tile, and the width - 1 before it, are copied into scratch memory first. There the initial state, or
// zeros, stand before the sequence, and the inputs under tap k are those k places further on.
#pragma once

#include "conv/cpu/common_impl.h"

namespace inlay::conv {
namespace {

template <class Vec>
struct ChannelWeights {
  typename Vec::Scalar weight[kMaxWidth];
  typename Vec::Scalar bias = 0;

  ChannelWeights(const Convolution& p, int64_t channel) {
    load(p.weight, channel * p.width, p.width, weight);
    if (p.bias.data) load(p.bias, channel, 1, &bias);
  }

 private:
  static void load(const VectorTensor& vector, int64_t first, int64_t count, typename Vec::Scalar* target) {
    with_element_type<Vec>(vector.dtype, [&](auto type) {
      const auto* source = static_cast<const typename decltype(type)::type*>(vector.data) + first;
      // One by one: fewer than a vector holds.
      for (int64_t i = 0; i < count; ++i) target[i] = sum(Vec::load(source + i, Partial{1}));
    });
  }
};

// The inputs at positions [begin, end) of a sequence, those before it from the initial state.
template <class T>
void copy_inputs(const Convolution& p, const Sequence& sequence, int64_t batch, int64_t channel, int64_t begin,
                 int64_t end, T* target) {
  const T* state = static_cast<const T*>(p.initial_state.data);
  for (; begin < sequence.begin; ++begin) {
    *target++ = state ? state[p.initial_state.offset(sequence.index, channel, p.state_column(sequence, begin))] : T{};
  }
  memcpy(target, static_cast<const T*>(p.x.data) + p.x.offset(batch, begin, channel), (end - begin) * sizeof(T));
}

// Preactivation of the token whose oldest tap lies at inputs[i].
template <class Vec, class T, class Lanes>
INLAY_INLINE Vec preactivation(const ChannelWeights<Vec>& weights, int64_t width, const T* inputs, int64_t i,
                               Lanes lanes) {
  Vec z = Vec::set(0);
  for (int64_t k = 0; k < width; ++k) {
    z = fma(Vec::set(weights.weight[k]), Vec::load(inputs + i + k, lanes), z);
  }
  return z + Vec::set(weights.bias);
}

// Calls body(sequence, begin, end) for tiles of a batch row's tokens, none of them in two sequences.
template <class Body>
INLAY_INLINE void for_tiles(const Convolution& p, int64_t batch, Body body) {
  for (int64_t begin = 0; begin < p.time;) {
    const Sequence sequence = p.sequences.find(batch, begin);
    const int64_t end = smaller(sequence.end, begin + kRowTile);
    body(sequence, begin, end);
    begin = end;
  }
}

template <class Vec, class T>
void forward_row(const ForwardParams& p, int64_t batch, int64_t channel, RowScratch<typename Vec::Scalar>& scratch) {
  const ChannelWeights<Vec> weights(p, channel);
  T* inputs = reinterpret_cast<T*>(scratch.inputs);
  for_tiles(p, batch, [&](const Sequence& sequence, int64_t begin, int64_t end) {
    copy_inputs(p, sequence, batch, channel, begin - (p.width - 1), end, inputs);
    T* y = static_cast<T*>(p.y.data) + p.y.offset(batch, begin, channel);
    sweep<Vec>(end - begin, [&](int64_t i, auto lanes) {
      const Vec z = preactivation<Vec, T>(weights, p.width, inputs, i, lanes);
      Vec::store(y + i, activate<Vec, T>(p.activation, p.rounds_preactivation, z), lanes);
    });
  });
}

template <class Vec>
void forward_tokens(const ForwardParams& p, int64_t begin, int64_t end, void* memory) {
  auto& scratch = *static_cast<RowScratch<typename Vec::Scalar>*>(memory);
  with_element_type<Vec>(p.dtype, [&](auto type) {
    for (int64_t row = begin; row < end; ++row) {
      forward_row<Vec, typename decltype(type)::type>(p, row / p.channels, row % p.channels, scratch);
    }
  });
}

// dx of one batch row's tokens [begin, end), and what they add to the sums: dweight's, then dbias's.
template <class Vec, class T>
void backward_tile(const BackwardParams& p, const ChannelWeights<Vec>& weights, const Sequence& sequence, int64_t batch,
                   int64_t channel, int64_t begin, int64_t end, RowScratch<typename Vec::Scalar>& scratch,
                   typename Vec::Scalar* sums) {
  using Scalar = typename Vec::Scalar;
  const int64_t reach = p.width - 1;  // dx of a token depends on as many gradients after its own
  const int64_t known = smaller(end + reach, sequence.end);
  T* inputs = reinterpret_cast<T*>(scratch.inputs);
  copy_inputs(p, sequence, batch, channel, begin - reach, known, inputs);
  const T* dy = static_cast<const T*>(p.dy.data) + p.dy.offset(batch, begin, channel);

  Vec totals[kMaxWidth + 1];
  for (Vec& total : totals) total = Vec::set(0);
  sweep<Vec>(end - begin, [&](int64_t i, auto lanes) {
    const Vec z = preactivation<Vec, T>(weights, p.width, inputs, i, lanes);
    // Nothing but zeros beyond the tile, so that these add nothing to the sums.
    const Vec g = Vec::keep(through_activation(p.activation, Vec::load(dy + i, lanes), z), lanes);
    Vec::store(scratch.gradient + i, g, lanes);
    for (int64_t k = 0; k < p.width; ++k) totals[k] = fma(g, Vec::load(inputs + i + k, lanes), totals[k]);
    totals[p.width] = totals[p.width] + g;
  });
  for (int64_t k = 0; k <= p.width; ++k) sums[k] += sum(totals[k]);
  sweep<Vec>(known - end, [&](int64_t i, auto lanes) {
    const int64_t token = end - begin + i;
    const Vec z = preactivation<Vec, T>(weights, p.width, inputs, token, lanes);
    Vec::store(scratch.gradient + token, through_activation(p.activation, Vec::load(dy + token, lanes), z), lanes);
  });
  for (int64_t t = known; t < end + reach; ++t) scratch.gradient[t - begin] = 0;

  // The last inputs of the sequence are also its final state.
  const int64_t kept = p.dfinal_state.data ? sequence.end - reach : sequence.end;
  const bool has_kept = end > kept;
  if (has_kept) {
    memset(scratch.dfinal_state, 0, (end - begin) * sizeof(Scalar));
    for (int64_t t = kept > begin ? kept : begin; t < end; ++t) {
      const T* state =
          static_cast<const T*>(p.dfinal_state.data) + p.dfinal_state.offset(sequence.index, channel, t - kept);
      Vec::store(scratch.dfinal_state + t - begin, Vec::load(state, Partial{1}), Partial{1});
    }
  }
  T* dx = static_cast<T*>(p.dx.data) + p.dx.offset(batch, begin, channel);
  sweep<Vec>(end - begin, [&](int64_t i, auto lanes) {
    Vec result = Vec::set(0);
    for (int64_t k = 0; k < p.width; ++k) {
      result = fma(Vec::set(weights.weight[k]), Vec::load(scratch.gradient + i + reach - k, lanes), result);
    }
    if (has_kept) result = result + Vec::load(scratch.dfinal_state + i, lanes);
    Vec::store(dx + i, result, lanes);
  });
}

// A channel's sums run over all its rows in order, so there is one group of tokens.
template <class Vec>
void backward_tokens(const BackwardParams& p, int64_t begin, int64_t end, void* memory) {
  using Scalar = typename Vec::Scalar;
  auto& scratch = *static_cast<RowScratch<Scalar>*>(memory);
  const Sums<Scalar> sums = sums_of<Scalar>(p, 0);
  for (int64_t channel = begin; channel < end; ++channel) {
    const ChannelWeights<Vec> weights(p, channel);
    Scalar totals[kMaxWidth + 1] = {};
    with_element_type<Vec>(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      for (int64_t batch = 0; batch < p.batch; ++batch) {
        for_tiles(p, batch, [&](const Sequence& sequence, int64_t first, int64_t last) {
          backward_tile<Vec, T>(p, weights, sequence, batch, channel, first, last, scratch, totals);
        });
      }
    });
    for (int64_t k = 0; sums.dweight && k < p.width; ++k) sums.dweight[k * p.channels + channel] = totals[k];
    if (sums.dbias) sums.dbias[channel] = totals[p.width];
  }
}

}  // namespace
}  // namespace inlay::conv
