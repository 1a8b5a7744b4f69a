// From products of queries and keys to the scores that the softmax sees: softcap, bias, and what hides keys.
#pragma once

#include "attention/cpu/rows_impl.h"

namespace inlay::attention {
namespace {

template <class Scalar>
constexpr Scalar kMinusInfinity = -static_cast<Scalar>(__builtin_inf());

template <class Vec>
class ScoreRows {
 public:
  using Scalar = typename Vec::Scalar;

  explicit ScoreRows(const Inputs& inputs) : inputs_(inputs) {}

  // Scores of one row against columns [columns.begin, columns.end) of the block of `count` keys from `key` on, in
  // place. With a softcap, `slopes` gets its derivatives unless it is null.
  INLAY_INLINE void finish(const RowTile& tile, int64_t row, const KeyRange& visible, int64_t key, int64_t count,
                           const Columns& columns, Scalar* scores, Scalar* slopes) const {
    if (inputs_.softcap > 0) cap(columns, scores, slopes);
    const int64_t end = smaller(columns.end, count);
    if (inputs_.bias.data) add_bias(tile, row, key, columns.begin, end, scores);
    if (inputs_.mask.data) apply_mask(tile, row, key, columns.begin, end, scores);
    if (!columns.partial) return;
    const int64_t hidden = smaller(columns.end, larger(columns.begin, visible.begin - key));
    for (int64_t j = columns.begin; j < hidden; ++j) scores[j] = kMinusInfinity<Scalar>;
    for (int64_t j = larger(columns.begin, visible.end - key); j < columns.end; ++j) {
      scores[j] = kMinusInfinity<Scalar>;
    }
  }

  // What dropout multiplies the probabilities of a row by, 0 or the same for all that are kept.
  void dropout_factors(const RowTile& tile, int64_t row, int64_t key, const Columns& columns, Scalar* factors) const {
    const Dropout& dropout = inputs_.dropout;
    const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
    const int64_t head = tile.head_of(row), query = tile.query_of(row);
    const Scalar keep = static_cast<Scalar>(dropout.keep_scale);
    const int64_t first = key + columns.begin, last = key + columns.end;
    for (int64_t block = first / 32; block * 32 < last; ++block) {
      for (int64_t quad = 0; quad < 4; ++quad) {
        const Philox numbers = Dropout::numbers(seed, tile.span.sequence, head, query, block, quad);
        for (int n = 0; n < 4; ++n) {
          for (int odd = 0; odd < 2; ++odd) {
            const int64_t j = block * 32 + 2 * quad + 8 * n + odd;
            if (j >= first && j < last) factors[j - key] = dropout.keeps(numbers, n, odd) ? keep : 0;
          }
        }
      }
    }
  }

 private:
  void cap(const Columns& columns, Scalar* scores, Scalar* slopes) const {
    const Vec limit = Vec::set(static_cast<Scalar>(inputs_.softcap));
    const Vec inverse = Vec::set(static_cast<Scalar>(1 / inputs_.softcap));
    for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) {
      const Vec t = tanh(Vec::load(scores + j, Full{}) * inverse);
      Vec::store(scores + j, limit * t, Full{});
      if (slopes) Vec::store(slopes + j, fma(-t, t, Vec::set(1)), Full{});
    }
  }

  void add_bias(const RowTile& tile, int64_t row, int64_t key, int64_t begin, int64_t end, Scalar* scores) const {
    const ScoreTensor& bias = inputs_.bias;
    with_element_type<Vec>(bias.dtype, [&](auto element) {
      const auto* data = static_cast<const typename decltype(element)::type*>(bias.data) +
                         bias.offset(tile.span.queries.batch, tile.head_of(row), tile.query_of(row), key);
      if (bias.key_stride == 1) {
        sweep<Vec>(end - begin, [&](int64_t j, auto lanes) {
          Scalar* at = scores + begin + j;
          Vec::store(at, Vec::load(at, Full{}) + Vec::load(data + begin + j, lanes), Full{});
        });
        return;
      }
      for (int64_t j = begin; j < end; ++j) {
        const Vec sum = Vec::load(scores + j, Partial{1}) + Vec::load(data + j * bias.key_stride, Partial{1});
        Vec::store(scores + j, sum, Partial{1});
      }
    });
  }

  void apply_mask(const RowTile& tile, int64_t row, int64_t key, int64_t begin, int64_t end, Scalar* scores) const {
    const ScoreTensor& mask = inputs_.mask;
    const uint8_t* data = static_cast<const uint8_t*>(mask.data) +
                          mask.offset(tile.span.queries.batch, tile.head_of(row), tile.query_of(row), key);
    if (mask.key_stride == 1) {
      for (int64_t j = begin; j < end; ++j) scores[j] = data[j] ? scores[j] : kMinusInfinity<Scalar>;
    } else {
      for (int64_t j = begin; j < end; ++j) {
        if (!data[j * mask.key_stride]) scores[j] = kMinusInfinity<Scalar>;
      }
    }
  }

  const Inputs& inputs_;
};

}  // namespace
}  // namespace inlay::attention
