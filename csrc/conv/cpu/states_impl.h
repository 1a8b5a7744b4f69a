// The gradient of the initial state, and single steps: a few tokens on top of a state. However the tensors lie, a block
// of channels is first gathered into rows.
#pragma once

#include "conv/cpu/common_impl.h"

namespace inlay::conv {
namespace {

// out[i] = source[i * stride], widened; and the reverse.
template <class Vec, class T>
void gather_row(const T* source, int64_t stride, int64_t count, typename Vec::Scalar* out) {
  alignas(64) T dense[kChannelBlock];
  gather(source, stride, count, dense);
  sweep<Vec>(count, [&](int64_t i, auto lanes) { Vec::store(out + i, Vec::load(dense + i, lanes), lanes); });
}
template <class Vec, class T>
void scatter_row(const typename Vec::Scalar* row, int64_t count, int64_t stride, T* target) {
  alignas(64) T dense[kChannelBlock];
  sweep<Vec>(count, [&](int64_t i, auto lanes) { Vec::store(dense + i, Vec::load(row + i, lanes), lanes); });
  for (int64_t i = 0; i < count; ++i) target[i * stride] = dense[i];
}

// z[i] = sum of weight[k] * inputs[k][i] + bias
template <class Vec, class Lanes>
INLAY_INLINE Vec preactivation_of_rows(const Scratch<typename Vec::Scalar>& scratch, int64_t width,
                                       const typename Vec::Scalar (*inputs)[kChannelBlock], int64_t i, Lanes lanes) {
  Vec z = Vec::set(0);
  for (int64_t k = 0; k < width; ++k) {
    z = fma(Vec::load(scratch.weight[k] + i, lanes), Vec::load(inputs[k] + i, lanes), z);
  }
  return z + Vec::load(scratch.bias + i, lanes);
}

// Column i of the state is the input at position begin - (width - 1) + i: its gradient is the sum over k of
// weight[k] * g[begin + i - k], plus the final state's where the sequence is so short that it still holds that input.
template <class Vec, class T>
void initial_state_gradient_piece(const BackwardParams& p, int64_t index, int64_t channel,
                                  Scratch<typename Vec::Scalar>& scratch) {
  using Scalar = typename Vec::Scalar;
  const Sequence sequence = p.sequences[index];
  const int64_t batch = p.sequences.batch_of(index);
  const int64_t columns = p.width - 1;
  const int64_t tokens = smaller(columns, sequence.length());
  const int64_t count = smaller(kChannelBlock, p.channels - channel);
  Scalar(*const inputs)[kChannelBlock] = scratch.gradient;  // columns of the state, then tokens
  Scalar(*const g)[kChannelBlock] = scratch.gradient + 2 * kMaxWidth;
  for (int64_t i = 0; i < columns; ++i) {
    gather_row<Vec>(static_cast<const T*>(p.initial_state.data) + p.initial_state.offset(index, channel, i),
                    p.initial_state.channel_stride, count, inputs[i]);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    gather_row<Vec>(static_cast<const T*>(p.x.data) + p.x.offset(batch, sequence.begin + t, channel),
                    p.x.channel_stride, count, inputs[columns + t]);
    gather_row<Vec>(static_cast<const T*>(p.dy.data) + p.dy.offset(batch, sequence.begin + t, channel),
                    p.dy.channel_stride, count, g[t]);
    sweep<Vec>(count, [&](int64_t i, auto lanes) {
      const Vec z = preactivation_of_rows<Vec>(scratch, p.width, inputs + t, i, lanes);
      Vec::store(g[t] + i, through_activation(p.activation, Vec::load(g[t] + i, lanes), z), lanes);
    });
  }
  for (int64_t column = 0; column < columns; ++column) {
    Scalar(&result)[kChannelBlock] = inputs[0];  // the inputs have served
    const bool kept = p.dfinal_state.data && column >= sequence.length();
    if (kept) {
      const int64_t offset = p.dfinal_state.offset(index, channel, column - sequence.length());
      gather_row<Vec>(static_cast<const T*>(p.dfinal_state.data) + offset, p.dfinal_state.channel_stride, count,
                      result);
    }
    sweep<Vec>(count, [&](int64_t i, auto lanes) {
      Vec sum = Vec::set(0);
      for (int64_t k = 0; k <= column; ++k) {
        if (column - k >= tokens) continue;
        sum = fma(Vec::load(scratch.weight[k] + i, lanes), Vec::load(g[column - k] + i, lanes), sum);
      }
      if (kept) sum = sum + Vec::load(result + i, lanes);
      Vec::store(result + i, sum, lanes);
    });
    scatter_row<Vec>(result, count, p.dinitial_state.channel_stride,
                     static_cast<T*>(p.dinitial_state.data) + p.dinitial_state.offset(index, channel, column));
  }
}

template <class Vec>
void initial_state_gradient(const BackwardParams& p, int64_t begin, int64_t end, void* memory) {
  auto& scratch = *static_cast<Scratch<typename Vec::Scalar>*>(memory);
  const int64_t blocks = channel_blocks(p.channels);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t channel = piece % blocks * kChannelBlock;
    load_weights<Vec>(p.weight, p.bias, p.width, channel, smaller(kChannelBlock, p.channels - channel), scratch);
    with_element_type<Vec>(p.dtype, [&](auto type) {
      initial_state_gradient_piece<Vec, typename decltype(type)::type>(p, piece / blocks, channel, scratch);
    });
  }
}

// The newest `columns` of the state followed by the tokens, in place.
template <class T>
void advance_state(const StepParams& p, int64_t slot, int64_t row, int64_t channel) {
  T* state = static_cast<T*>(p.state.data) + p.state.offset(slot, channel, 0);
  const T* x = static_cast<const T*>(p.x.data) + p.x.offset(row, 0, channel);
  for (int64_t column = 0; column < p.columns; ++column) {
    const int64_t newer = column + p.time;
    state[column * p.state.column_stride] =
        newer < p.columns ? state[newer * p.state.column_stride] : x[(newer - p.columns) * p.x.time_stride];
  }
}

template <class Vec, class T>
void step_piece(const StepParams& p, int64_t row, int64_t channel, Scratch<typename Vec::Scalar>& scratch) {
  using Scalar = typename Vec::Scalar;
  const int64_t count = smaller(kChannelBlock, p.channels - channel);
  const int64_t slot = p.slot(row);
  T* const y = static_cast<T*>(p.y.data) + p.y.offset(row, 0, channel);
  if (slot < 0) {
    for (int64_t t = 0; t < p.time; ++t) memset(y + t * p.y.time_stride, 0, count * sizeof(T));
    return;
  }
  Scalar(*const inputs)[kChannelBlock] = scratch.gradient;  // the last width of them, oldest first
  for (int64_t i = 0; i < p.width - 1; ++i) {
    const int64_t column = p.columns - (p.width - 1) + i;
    gather_row<Vec>(static_cast<const T*>(p.state.data) + p.state.offset(slot, channel, column), p.state.channel_stride,
                    count, inputs[i]);
  }
  for (int64_t t = 0; t < p.time; ++t) {
    gather_row<Vec>(static_cast<const T*>(p.x.data) + p.x.offset(row, t, channel), p.x.channel_stride, count,
                    inputs[p.width - 1]);
    sweep<Vec>(count, [&](int64_t i, auto lanes) {
      const Vec z = preactivation_of_rows<Vec>(scratch, p.width, inputs, i, lanes);
      Vec::store(y + t * p.y.time_stride + i, activate<Vec, T>(p.activation, p.rounds_preactivation, z), lanes);
    });
    if (t + 1 < p.time) memmove(inputs[0], inputs[1], (p.width - 1) * sizeof inputs[0]);
  }
  for (int64_t i = 0; i < count; ++i) advance_state<T>(p, slot, row, channel + i);
}

template <class Vec>
void step(const StepParams& p, int64_t begin, int64_t end, void* memory) {
  auto& scratch = *static_cast<Scratch<typename Vec::Scalar>*>(memory);
  const int64_t blocks = channel_blocks(p.channels);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t channel = piece % blocks * kChannelBlock;
    load_weights<Vec>(p.weight, p.bias, p.width, channel, smaller(kChannelBlock, p.channels - channel), scratch);
    with_element_type<Vec>(p.dtype, [&](auto type) {
      step_piece<Vec, typename decltype(type)::type>(p, piece / blocks, channel, scratch);
    });
  }
}

}  // namespace
}  // namespace inlay::conv
