// What the passes of the backward share: probabilities of a tile of rows against a block of keys, and their gradients.
//
//   P = exp(S - lse);   dP = dO V^T;   dS = P (dP - delta)       delta = <dO, O> - dlse, of each row
//
// With dropout's factors F: dS = P (F dP - delta), and P F is what multiplies V.
#pragma once

#include "attention/cpu/scores_impl.h"

namespace inlay::attention {
namespace {

template <class Vec>
class Gradients {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  Gradients(const BackwardParams& p, const BackwardScratch& scratch, MatrixArena<Scalar>& arena)
      : k(arena.take(backward_block(p.inputs), p.inputs.head_dim)),
        probabilities(arena.take(max_rows(p.inputs), backward_block(p.inputs))),
        dscores(arena.take(max_rows(p.inputs), backward_block(p.inputs))),
        p_(p),
        inputs_(p.inputs),
        scratch_(scratch),
        scores_(p.inputs),
        k_transposed_(arena.take(p.inputs.head_dim, backward_block(p.inputs))),
        v_transposed_(arena.take(p.inputs.value_dim, backward_block(p.inputs))),
        lse_(arena.take_row(max_rows(p.inputs))),
        delta_(arena.take_row(max_rows(p.inputs))),
        factors_(arena.take_row(backward_block(p.inputs))),
        slopes_(arena.take_row(backward_block(p.inputs))),
        ranges_(reinterpret_cast<KeyRange*>(arena.take_row(kRangeElements * max_rows(p.inputs)))) {}

  static int64_t max_rows(const Inputs& inputs) {
    return larger(backward_queries(inputs) * inputs.group(), kBiasQueries);
  }

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    const int64_t rows = max_rows(inputs), d = inputs.head_dim, dv = inputs.value_dim;
    return Arena::elements(backward_block(inputs), d) + 2 * Arena::elements(rows, backward_block(inputs)) +
           Arena::elements(d + dv, backward_block(inputs)) + 2 * Arena::elements(1, rows) +
           2 * Arena::elements(1, backward_block(inputs)) + Arena::elements(1, kRangeElements * rows);
  }

  // `count` keys from `key` on. `values` is memory for a block of values.
  void load_keys(const Span& span, int64_t head, int64_t key, int64_t count, M values) {
    const int64_t padded = round_up(count, Vec::lanes), token = span.keys.begin + key;
    key_ = key;
    count_ = count;
    load_tokens<Vec>(inputs_.k, span.keys.batch, token, head, 0, inputs_.head_dim, count, padded, k);
    transpose<Vec>(k, k_transposed_, count, inputs_.head_dim);
    load_tokens<Vec>(inputs_.v, span.keys.batch, token, head, 0, inputs_.value_dim, count, count, values);
    transpose<Vec>(values, v_transposed_, count, inputs_.value_dim);
  }

  // `seen`: keys that all of the tile's queries see, whose ranges need then not be looked at.
  void load_rows(const RowTile& tile, const KeyRange& seen) {
    q = rows_of(scratch_.q, tile, inputs_.head_dim);
    dout = rows_of(scratch_.dout, tile, inputs_.value_dim);
    const Scalar* lse = static_cast<const Scalar*>(p_.lse.data);
    const Scalar* delta = static_cast<const Scalar*>(scratch_.delta);
    for (int64_t row = 0; row < tile.rows(); ++row) {
      const int64_t index = row_index(inputs_, tile, row);
      // A row that sees no key has probabilities of 0, which minus infinity less itself would not give.
      lse_[row] = lse[index] == kMinusInfinity<Scalar> ? -kMinusInfinity<Scalar> : lse[index];
      delta_[row] = delta[index];
    }
    whole_ = seen.begin <= key_ && seen.end >= key_ + count_;
    if (whole_) return;
    for (int64_t i = 0; i < tile.queries; ++i) ranges_[i] = tile.span.visible(inputs_, tile.query + i);
  }

  // The tile's rows in the scratch memory.
  M rows_of(void* memory, const RowTile& tile, int64_t width) const {
    const int64_t group = inputs_.group(), head = tile.head / group, stride = padded_stride<Scalar>(width);
    const int64_t row =
        scratch_row(inputs_, tile.span.queries.batch, head, tile.span.queries.begin + tile.query) + tile.head % group;
    return {static_cast<Scalar*>(memory) + row * stride, stride * group / tile.heads};
  }

  // Rows that are worked on together. Where not all see every key, few at a time: each strip goes as far as its own
  // queries see.
  int64_t strip_rows(const RowTile& tile) const { return whole_ ? tile.rows() : kStrip; }

  Columns columns(const RowTile& tile, int64_t first, int64_t last) const {
    const int64_t padded = round_up(count_, Vec::lanes);
    if (whole_ && padded == count_) return {0, padded, false};
    if (whole_) return {0, padded, true};
    return columns_of<Vec>(ranges_, first, last, tile.heads, key_, count_);
  }

  // Probabilities, times dropout's factors, and the gradients of scores of rows [first, last) in these columns.
  // Before the softcap, which are those of a bias, or behind it: of products of queries and keys.
  void compute(const RowTile& tile, int64_t first, int64_t last, const Columns& columns, bool before_softcap) {
    const int64_t rows = last - first, width = columns.end - columns.begin;
    multiply<Vec>({rows, width, inputs_.head_dim, from_row(q, first), from_column(k_transposed_, columns.begin),
                   from_column(from_row(probabilities, first), columns.begin)});
    multiply<Vec>({rows, width, inputs_.value_dim, from_row(dout, first), from_column(v_transposed_, columns.begin),
                   from_column(from_row(dscores, first), columns.begin)});
    const bool capped = inputs_.softcap > 0 && !before_softcap;
    for (int64_t row = first; row < last; ++row) {
      fetch_ahead(row, tile.rows());
      Scalar* p = probabilities.row(row);
      Scalar* ds = dscores.row(row);
      const KeyRange range = whole_ ? KeyRange{key_, key_ + count_} : ranges_[row / tile.heads];
      scores_.finish(tile, row, range, key_, count_, columns, p, capped ? slopes_ : nullptr);
      if (inputs_.dropout.seed) {
        scores_.dropout_factors(tile, row, key_, columns, factors_);
        gradient_row<true>(row, columns, p, ds);
      } else {
        gradient_row<false>(row, columns, p, ds);
      }
      if (!capped) continue;
      for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) {
        Vec::store(ds + j, Vec::load(ds + j, Full{}) * Vec::load(slopes_ + j, Full{}), Full{});
      }
    }
  }

  M k;                 // [keys, D]
  M q{nullptr, 0};     // [rows, D], times the scale
  M dout{nullptr, 0};  // [rows, DV], of o
  M probabilities;
  M dscores;
  M dq{nullptr, 0};  // of the tile, or null: not wanted

 private:
  static constexpr int64_t kRangeElements = sizeof(KeyRange) / sizeof(Scalar);
  static constexpr int64_t kStrip = 24;  // a multiple of every tier's rows of a product's tile

  // What is needed next, while there is other work: the row of dq, and those of the next tile. Harmless beyond the
  // last.
  INLAY_INLINE void fetch_ahead(int64_t row, int64_t rows) const {
    constexpr int64_t line = kLineBytes / static_cast<int64_t>(sizeof(Scalar));
    for (int64_t j = 0; j < inputs_.head_dim; j += line) {
      if (dq.data) __builtin_prefetch(dq.row(row) + j, 1, 2);
      __builtin_prefetch(q.row(row + rows) + j, 0, 2);
    }
    for (int64_t j = 0; j < inputs_.value_dim; j += line) __builtin_prefetch(dout.row(row + rows) + j, 0, 2);
  }

  template <bool dropout>
  INLAY_INLINE void gradient_row(int64_t row, const Columns& columns, Scalar* p, Scalar* ds) const {
    const Vec lse = Vec::set(lse_[row]), delta = Vec::set(delta_[row]);
    for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) {
      const Vec probability = exp_of_nonpositive(Vec::load(p + j, Full{}) - lse);
      Vec dprobability = Vec::load(ds + j, Full{});
      if constexpr (dropout) {
        const Vec factor = Vec::load(factors_ + j, Full{});
        dprobability = dprobability * factor;
        Vec::store(p + j, probability * factor, Full{});
      } else {
        Vec::store(p + j, probability, Full{});
      }
      Vec::store(ds + j, probability * (dprobability - delta), Full{});
    }
  }

  const BackwardParams& p_;
  const Inputs& inputs_;
  const BackwardScratch& scratch_;
  ScoreRows<Vec> scores_;
  M k_transposed_;  // [D, keys]
  M v_transposed_;  // [DV, keys]
  Scalar* lse_;
  Scalar* delta_;
  Scalar* factors_;
  Scalar* slopes_;
  KeyRange* ranges_;  // of each query, unless `whole_`
  int64_t key_ = 0;
  int64_t count_ = 0;
  bool whole_ = false;
};

}  // namespace
}  // namespace inlay::attention
