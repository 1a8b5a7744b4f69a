// Forward and backward with the channels innermost in memory: vectors of channels, row by row through time.
//
// Every token is a row of channels. The inputs under the taps of a token are the width rows up to its own: of x, of the
// initial state, or zeros. Once their addresses are known the kernels need not know where a sequence begins. A few
// tokens are worked on together, so that weights, and their gradients' sums, are loaded once for all of them.
#pragma once

#include "conv/cpu/common_impl.h"

namespace inlay::conv {
namespace {

constexpr int64_t kTokens = 4;  // worked on together

// A block of channels of one batch row, and where the rows of its tokens lie.
template <class Vec, class T>
class ChannelBlock {
 public:
  using Scalar = typename Vec::Scalar;

  ChannelBlock(const Convolution& p, int64_t batch, int64_t channel, Scratch<Scalar>& scratch)
      : p_(p), channel_(channel), scratch_(scratch) {
    x_ = static_cast<const T*>(p.x.data) + p.x.offset(batch, 0, 0) + channel;
  }

  int64_t count() const { return smaller(kChannelBlock, p_.channels - channel_); }

  // To be called before rows() reaches before the sequence.
  void load_state(const Sequence& sequence) {
    if (p_.initial_state.data) load_columns(p_.initial_state, sequence.index, scratch_.state);
  }
  void load_columns(const StateInput& state, int64_t sequence, typename Scratch<Scalar>::InputRow* target) {
    for (int64_t column = 0; column < p_.width - 1; ++column) {
      const T* source = static_cast<const T*>(state.data) + state.offset(sequence, channel_, column);
      gather(source, state.channel_stride, count(), reinterpret_cast<T*>(target[column]));
    }
  }

  // rows[i] is the input at position t - (width - 1) + i.
  INLAY_INLINE void rows(const Sequence& sequence, int64_t t, int64_t tokens, const T** rows) const {
    for (int64_t i = 0; i < tokens + p_.width - 1; ++i) {
      const int64_t position = t - (p_.width - 1) + i;
      if (position >= sequence.begin) {
        rows[i] = x_ + position * p_.x.time_stride;
      } else if (p_.initial_state.data) {
        rows[i] = reinterpret_cast<const T*>(scratch_.state[p_.state_column(sequence, position)]);
      } else {
        rows[i] = zeros();
      }
    }
  }
  const T* zeros() const { return reinterpret_cast<const T*>(scratch_.zeros); }

 private:
  const Convolution& p_;
  int64_t channel_;
  Scratch<Scalar>& scratch_;
  const T* x_;
};

// sum of weight[k] * rows[token + k] + bias, for some consecutive tokens
template <class Vec, class T, int64_t tokens, class Lanes>
INLAY_INLINE void preactivations(const Scratch<typename Vec::Scalar>& scratch, int64_t width, const T* const* rows,
                                 int64_t i, Lanes lanes, Vec (&z)[tokens]) {
  for (int64_t token = 0; token < tokens; ++token) z[token] = Vec::set(0);
  for (int64_t k = 0; k < width; ++k) {
    const Vec weight = Vec::load(scratch.weight[k] + i, lanes);
    for (int64_t token = 0; token < tokens; ++token) {
      z[token] = fma(weight, Vec::load(rows[token + k] + i, lanes), z[token]);
    }
  }
  const Vec bias = Vec::load(scratch.bias + i, lanes);
  for (int64_t token = 0; token < tokens; ++token) z[token] = z[token] + bias;
}

// Calls body(constant, t) for tokens [begin, end): kTokens of them at once, then one at a time.
template <class Body>
INLAY_INLINE void for_tokens(int64_t begin, int64_t end, Body body) {
  int64_t t = begin;
  for (; t + kTokens <= end; t += kTokens) body(Count<kTokens>{}, t);
  for (; t < end; ++t) body(Count<1>{}, t);
}

template <class Vec, class T>
void forward_piece(const ForwardParams& p, int64_t batch, int64_t first, int64_t last, int64_t channel,
                   Scratch<typename Vec::Scalar>& scratch, bool stream) {
  ChannelBlock<Vec, T> block(p, batch, channel, scratch);
  for (int64_t t = first; t < last;) {
    const Sequence sequence = p.sequences.find(batch, t);
    const int64_t end = smaller(sequence.end, last);
    if (t - (p.width - 1) < sequence.begin) block.load_state(sequence);
    for_tokens(t, end, [&](auto count, int64_t t) {
      constexpr int64_t tokens = decltype(count)::value;
      const T* rows[kTokens + kMaxWidth - 1];
      block.rows(sequence, t, tokens, rows);
      T* y = static_cast<T*>(p.y.data) + p.y.offset(batch, t, channel);
      sweep<Vec>(block.count(), [&](int64_t i, auto lanes) {
        Vec z[tokens];
        preactivations<Vec, T, tokens>(scratch, p.width, rows, i, lanes, z);
        for (int64_t token = 0; token < tokens; ++token) {
          store(y + token * p.y.time_stride + i, activate<Vec, T>(p.activation, p.rounds_preactivation, z[token]),
                lanes, stream);
        }
      });
    });
    t = end;
  }
}

template <class Vec>
void forward_channels(const ForwardParams& p, int64_t begin, int64_t end, void* memory, bool stream) {
  auto& scratch = *static_cast<Scratch<typename Vec::Scalar>*>(memory);
  memset(scratch.zeros, 0, sizeof scratch.zeros);
  const int64_t tiles = token_tiles(p.time);
  int64_t loaded = -1;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t channel = piece / (p.batch * tiles) * kChannelBlock;
    const int64_t batch = piece / tiles % p.batch;
    const int64_t first = piece % tiles * kTokenTile;
    if (channel != loaded) {
      load_weights<Vec>(p.weight, p.bias, p.width, channel, smaller(kChannelBlock, p.channels - channel), scratch);
      loaded = channel;
    }
    with_element_type<Vec>(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      forward_piece<Vec, T>(p, batch, first, smaller(first + kTokenTile, p.time), channel, scratch,
                            stream && can_stream<Vec, T>(p.y.data, p.channels));
    });
  }
}

// Gradient rows of tokens [begin, end), of which those below `summed` add to the sums over tokens.
template <class Vec, class T>
void gradient_rows(const BackwardParams& p, const ChannelBlock<Vec, T>& block, const Sequence& sequence, int64_t batch,
                   int64_t channel, int64_t begin, int64_t summed, int64_t end, Sums<typename Vec::Scalar> sums,
                   Scratch<typename Vec::Scalar>& scratch) {
  const auto make = [&](auto count, int64_t t, bool adds) {
    constexpr int64_t tokens = decltype(count)::value;
    const T* rows[kTokens + kMaxWidth - 1];
    block.rows(sequence, t, tokens, rows);
    const T* dy = static_cast<const T*>(p.dy.data) + p.dy.offset(batch, t, 0) + channel;
    sweep<Vec>(block.count(), [&](int64_t i, auto lanes) {
      Vec z[tokens];
      preactivations<Vec, T, tokens>(scratch, p.width, rows, i, lanes, z);
      Vec g[tokens];
      for (int64_t token = 0; token < tokens; ++token) {
        const Vec upstream = Vec::load(dy + token * p.dy.time_stride + i, lanes);
        g[token] = through_activation(p.activation, upstream, z[token]);
        Vec::store(scratch.gradient[t + token - begin] + i, g[token], lanes);
      }
      if (adds && sums.dweight) {
        for (int64_t k = 0; k < p.width; ++k) {
          auto* target = sums.dweight + k * p.channels + channel + i;
          Vec sum = Vec::load(target, lanes);
          for (int64_t token = 0; token < tokens; ++token) {
            sum = fma(g[token], Vec::load(rows[token + k] + i, lanes), sum);
          }
          Vec::store(target, sum, lanes);
        }
      }
      if (adds && sums.dbias) {
        auto* target = sums.dbias + channel + i;
        Vec sum = Vec::load(target, lanes);
        for (int64_t token = 0; token < tokens; ++token) sum = sum + g[token];
        Vec::store(target, sum, lanes);
      }
    });
  };
  for_tokens(begin, summed, [&](auto count, int64_t t) { make(count, t, true); });
  for_tokens(summed, end, [&](auto count, int64_t t) { make(count, t, false); });
}

// Tokens [first, last) of one batch row: dx, and what they add to the sums.
template <class Vec, class T>
void backward_tile(const BackwardParams& p, int64_t batch, int64_t first, int64_t last, int64_t channel,
                   Sums<typename Vec::Scalar> sums, Scratch<typename Vec::Scalar>& scratch, bool stream) {
  ChannelBlock<Vec, T> block(p, batch, channel, scratch);
  const int64_t reach = p.width - 1;  // dx of a token depends on as many gradients after its own
  for (int64_t begin = first; begin < last;) {
    const Sequence sequence = p.sequences.find(batch, begin);
    const int64_t end = smaller(sequence.end, last);
    if (begin - reach < sequence.begin) block.load_state(sequence);
    const int64_t known = smaller(end + reach, sequence.end);
    gradient_rows<Vec, T>(p, block, sequence, batch, channel, begin, end, known, sums, scratch);
    for (int64_t t = known; t < end + reach; ++t) {
      memset(scratch.gradient[t - begin], 0, sizeof scratch.gradient[0]);
    }
    // The last inputs of the sequence are also its final state.
    const int64_t kept = p.dfinal_state.data ? sequence.end - reach : sequence.end;
    if (end > kept) block.load_columns(p.dfinal_state, sequence.index, scratch.dfinal_state);

    for_tokens(begin, end, [&](auto count, int64_t t) {
      constexpr int64_t tokens = decltype(count)::value;
      T* dx = static_cast<T*>(p.dx.data) + p.dx.offset(batch, t, channel);
      sweep<Vec>(block.count(), [&](int64_t i, auto lanes) {
        Vec sum[tokens];
        for (Vec& value : sum) value = Vec::set(0);
        for (int64_t k = 0; k < p.width; ++k) {
          const Vec weight = Vec::load(scratch.weight[k] + i, lanes);
          for (int64_t token = 0; token < tokens; ++token) {
            sum[token] = fma(weight, Vec::load(scratch.gradient[t + token - begin + reach - k] + i, lanes), sum[token]);
          }
        }
        for (int64_t token = 0; token < tokens; ++token) {
          if (t + token >= kept) {
            const auto* state = reinterpret_cast<const T*>(scratch.dfinal_state[t + token - kept]);
            sum[token] = sum[token] + Vec::load(state + i, lanes);
          }
          store(dx + token * p.dx.time_stride + i, sum[token], lanes, stream);
        }
      });
    });
    begin = end;
  }
}

template <class Vec>
void backward_channels(const BackwardParams& p, int64_t begin, int64_t end, void* memory, bool stream) {
  using Scalar = typename Vec::Scalar;
  auto& scratch = *static_cast<Scratch<Scalar>*>(memory);
  memset(scratch.zeros, 0, sizeof scratch.zeros);
  const int64_t groups = p.partial_rows;
  const int64_t tokens = p.batch * p.time;
  int64_t loaded = -1;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t group = piece % groups;
    const int64_t channel = piece / groups * kChannelBlock;
    const int64_t count = smaller(kChannelBlock, p.channels - channel);
    if (channel != loaded) {
      load_weights<Vec>(p.weight, p.bias, p.width, channel, count, scratch);
      loaded = channel;
    }
    const Sums<Scalar> sums = sums_of<Scalar>(p, group);
    for (int64_t k = 0; k < p.sums(); ++k) {
      memset(static_cast<Scalar*>(p.partials) + (group * p.sums() + k) * p.channels + channel, 0,
             count * sizeof(Scalar));
    }
    const int64_t last = tokens / groups * (group + 1) + smaller(group + 1, tokens % groups);
    for (int64_t t = tokens / groups * group + smaller(group, tokens % groups); t < last;) {
      const int64_t batch = t / p.time;
      const int64_t tile_end = smaller(smaller(last, (batch + 1) * p.time), t + kTokenTile);
      with_element_type<Vec>(p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        backward_tile<Vec, T>(p, batch, t - batch * p.time, tile_end - batch * p.time, channel, sums, scratch,
                              stream && can_stream<Vec, T>(p.dx.data, p.channels));
      });
      t = tile_end;
    }
  }
}

}  // namespace
}  // namespace inlay::conv
