// Forward of attention. A task is a tile of rows, and walks over the blocks of keys that any of them sees:
//
//   S = Q K^T, finished (scores_impl.h)
//   m' = max(m, rows of S);  P = exp(S - m');  l = l exp(m - m') + sums of P;  O = O exp(m - m') + P V
//
// and O / l at the end. Keys and values of a block are packed once for all rows; the rows then pass by in strips, each
// as far as its own queries see: where a causal diagonal cuts a block, what lies beyond it is not computed. Blocks are
// counted from the sequence's first key, so that a row's numbers depend on nothing but its own keys.
#pragma once

#include "attention/cpu/scores_impl.h"

namespace inlay::attention {
namespace {

INLAY_INLINE float log_of(float v) { return __builtin_logf(v); }
INLAY_INLINE double log_of(double v) { return __builtin_log(v); }

// The largest lane, at least `least`; NaN lanes have no say.
template <class Vec>
INLAY_INLINE typename Vec::Scalar largest(Vec v, typename Vec::Scalar least) {
  typename Vec::Scalar lanes[Vec::lanes];
  Vec::store(lanes, v, Full{});
  for (const typename Vec::Scalar lane : lanes) least = lane > least ? lane : least;
  return least;
}

template <class Vec>
class Forward {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  Forward(const ForwardParams& p, void* memory) : Forward(p, MatrixArena<Scalar>(memory)) {}

  static int64_t rows_of(const Inputs& inputs) {
    return queries_of(forward_rows(inputs), inputs.group()) * inputs.group();
  }

  static int64_t bytes(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    const int64_t rows = rows_of(inputs), d = inputs.head_dim, dv = inputs.value_dim;
    const int64_t elements = Arena::elements(rows, d) + Arena::elements(rows, dv) + Arena::elements(kForwardKeys, d) +
                             Arena::elements(d, kForwardKeys) + Arena::elements(kForwardKeys, dv) +
                             Arena::elements(kStrip, kForwardKeys) + Arena::elements(3, larger(rows, kForwardKeys)) +
                             Arena::elements(1, 0);
    return elements * static_cast<int64_t>(sizeof(Scalar)) + rows * static_cast<int64_t>(sizeof(KeyRange));
  }

  void run(const QueryTask& task) {
    const Span span(inputs_, task.sequence);
    const int64_t group = inputs_.group();
    const RowTile tile{span, task.key_head * group, group, task.begin, task.count};
    KeyRange any{span.key_count, 0};
    for (int64_t i = 0; i < task.count; ++i) {
      ranges_[i] = span.visible(inputs_, task.begin + i);
      if (ranges_[i].empty()) continue;
      any = {smaller(any.begin, ranges_[i].begin), larger(any.end, ranges_[i].end)};
    }
    start(tile);
    for (int64_t key = round_down(any.begin, kForwardKeys); key < any.end; key += kForwardKeys) {
      const int64_t count = smaller(kForwardKeys, any.end - key);
      pack(span, task.key_head, key, count);
      for (int64_t row = 0; row < tile.rows(); row += kStrip) {
        strip(tile, row, smaller(tile.rows(), row + kStrip), key, count);
      }
    }
    finish(tile);
  }

 private:
  static constexpr int64_t kStrip = 48;  // a multiple of every tier's rows of a product's tile

  Forward(const ForwardParams& p, MatrixArena<Scalar> arena)
      : p_(p),
        inputs_(p.inputs),
        scores_(p.inputs),
        q_(arena.take(rows_of(p.inputs), p.inputs.head_dim)),
        o_(arena.take(rows_of(p.inputs), p.inputs.value_dim)),
        k_(arena.take(kForwardKeys, p.inputs.head_dim)),
        k_transposed_(arena.take(p.inputs.head_dim, kForwardKeys)),
        v_(arena.take(kForwardKeys, p.inputs.value_dim)),
        s_(arena.take(kStrip, kForwardKeys)),
        most_(arena.take_row(larger(rows_of(p.inputs), kForwardKeys))),
        sums_(arena.take_row(larger(rows_of(p.inputs), kForwardKeys))),
        factors_(arena.take_row(larger(rows_of(p.inputs), kForwardKeys))),
        ranges_(reinterpret_cast<KeyRange*>(arena.take_row(0))) {}

  // A sink is a first key without a value.
  void start(const RowTile& tile) {
    load_tile<Vec>(inputs_.q, tile, inputs_.head_dim, static_cast<Scalar>(inputs_.scale), q_);
    for (int64_t row = 0; row < tile.rows(); ++row) {
      fill_zero(o_.row(row), round_up(inputs_.value_dim, Vec::lanes));
      most_[row] = kMinusInfinity<Scalar>;
      sums_[row] = 0;
      if (!inputs_.sinks.data) continue;
      most_[row] = load_element<Vec>(inputs_.sinks, tile.head_of(row));
      sums_[row] = most_[row] == kMinusInfinity<Scalar> ? 0 : 1;
    }
  }

  void pack(const Span& span, int64_t head, int64_t key, int64_t count) {
    const int64_t padded = round_up(count, Vec::lanes), token = span.keys.begin + key;
    load_tokens<Vec>(inputs_.k, span.keys.batch, token, head, 0, inputs_.head_dim, count, count, k_);
    transpose<Vec>(k_, k_transposed_, count, inputs_.head_dim);
    load_tokens<Vec>(inputs_.v, span.keys.batch, token, head, 0, inputs_.value_dim, count, padded, v_);
  }

  // Rows [first, last) of the tile.
  void strip(const RowTile& tile, int64_t first, int64_t last, int64_t key, int64_t count) {
    const Columns columns = columns_of<Vec>(ranges_, first, last, tile.heads, key, count);
    if (columns.empty()) return;
    const int64_t rows = last - first, width = columns.end - columns.begin;
    const int64_t dim = inputs_.head_dim, value_dim = round_up(inputs_.value_dim, Vec::lanes);
    multiply<Vec>({rows, width, dim, from_row(q_, first), from_column(k_transposed_, columns.begin),
                   from_column(s_, columns.begin)});
    for (int64_t r = 0; r < rows; ++r) softmax_row(tile, first + r, key, count, columns, s_.row(r));
    GemmOperands<Scalar> product{
        rows, value_dim, width, from_column(s_, columns.begin), from_row(v_, columns.begin), from_row(o_, first)};
    product.c_factor = 1;
    multiply<Vec>(product);
  }

  void softmax_row(const RowTile& tile, int64_t row, int64_t key, int64_t count, const Columns& columns,
                   Scalar* scores) {
    scores_.finish(tile, row, ranges_[row / tile.heads], key, count, columns, scores, nullptr);
    Vec most = Vec::set(most_[row]);
    for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) most = max(most, Vec::load(scores + j, Full{}));
    const Scalar before = most_[row], now = largest(most, before);
    const Scalar base = now == kMinusInfinity<Scalar> ? 0 : now;  // a row that has seen no key yet
    const Vec shift = Vec::set(base);
    Vec sum_of_row = Vec::set(0);
    for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) {
      const Vec probability = exp_of_nonpositive(Vec::load(scores + j, Full{}) - shift);
      sum_of_row = sum_of_row + probability;
      Vec::store(scores + j, probability, Full{});
    }
    if (now != before) {
      const Scalar factor = before == kMinusInfinity<Scalar> ? 0 : exp_of<Vec>(before - base);
      sums_[row] *= factor;
      most_[row] = now;
      const Vec factors = Vec::set(factor);
      Scalar* o = o_.row(row);
      for (int64_t j = 0; j < inputs_.value_dim; j += Vec::lanes) {
        Vec::store(o + j, factors * Vec::load(o + j, Full{}), Full{});
      }
    }
    sums_[row] += sum(sum_of_row);
    if (!inputs_.dropout.seed) return;
    scores_.dropout_factors(tile, row, key, columns, factors_);
    for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) {
      Vec::store(scores + j, Vec::load(scores + j, Full{}) * Vec::load(factors_ + j, Full{}), Full{});
    }
  }

  void finish(const RowTile& tile) {
    const int64_t width = inputs_.value_dim, batch = tile.span.queries.batch;
    const TokenTensor& gate = inputs_.gate;
    with_element_type<Vec>(inputs_.q.dtype, [&](auto element) {
      using Element = typename decltype(element)::type;
      tile.each([&](int64_t row, int64_t token, int64_t head) {
        const Scalar total = sums_[row];
        const Vec inverse = Vec::set(total == 0 ? 0 : 1 / total);
        const int64_t index = ((batch * inputs_.queries.tokens + token) * inputs_.query_heads + head) * width;
        Element* y = static_cast<Element*>(p_.y.data) + index;
        Element* o = p_.o.data ? static_cast<Element*>(p_.o.data) + index : nullptr;
        const Element* g =
            gate.data ? static_cast<const Element*>(gate.data) + gate.offset(batch, token, head) : nullptr;
        sweep<Vec>(width, [&](int64_t j, auto lanes) {
          const Vec value = Vec::load(o_.row(row) + j, Full{}) * inverse;
          if (o) Vec::store(o + j, value, lanes);
          Vec::store(y + j, g ? value * sigmoid(Vec::load(g + j, lanes)) : value, lanes);
        });
      });
    });
    if (!p_.lse.data) return;
    Scalar* lse = static_cast<Scalar*>(p_.lse.data);
    for (int64_t row = 0; row < tile.rows(); ++row) {
      const Scalar total = sums_[row];
      lse[row_index(inputs_, tile, row)] = total == 0 ? kMinusInfinity<Scalar> : most_[row] + log_of(total);
    }
  }

  const ForwardParams& p_;
  const Inputs& inputs_;
  ScoreRows<Vec> scores_;
  M q_;  // times the scale
  M o_;
  M k_;
  M k_transposed_;  // [D, kForwardKeys]
  M v_;
  M s_;           // scores, then probabilities, of a strip
  Scalar* most_;  // m and l, of each row
  Scalar* sums_;
  Scalar* factors_;
  KeyRange* ranges_;  // of each query
};

}  // namespace
}  // namespace inlay::attention
