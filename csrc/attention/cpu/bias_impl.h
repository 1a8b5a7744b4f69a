// The gradient of a bias: that of the scores, added up over the dimensions that the bias was broadcast along. A pass of
// its own, as each task can then add up its part of the result in a fixed order, whatever those dimensions are.
#pragma once

#include "attention/cpu/gradients_impl.h"

namespace inlay::attention {
namespace {

template <class Vec>
class BiasGradient {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  BiasGradient(const BackwardParams& p, const BackwardScratch& scratch, void* memory)
      : BiasGradient(p, scratch, MatrixArena<Scalar>(memory)) {}

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    return Gradients<Vec>::elements(inputs) + Arena::elements(backward_block(inputs), inputs.value_dim) +
           Arena::elements(kBiasQueries, backward_block(inputs));
  }

  void run(const BiasTask& task) {
    one_query_ = p_.dbias.sizes[2] == 1;
    one_key_ = p_.dbias.sizes[3] == 1;
    const int64_t rows = one_query_ ? 1 : task.end[2] - task.begin[2];
    const int64_t columns = one_key_ ? 1 : task.end[3] - task.begin[3];
    for (int64_t i = 0; i < rows; ++i) fill_zero(sums_.row(i), round_up(columns, Vec::lanes));
    for (int64_t batch = task.begin[0]; batch < task.end[0]; ++batch) {
      const Span span(inputs_, batch);
      for (int64_t head = task.begin[1]; head < task.end[1]; ++head) {
        for (int64_t key = task.begin[3]; key < task.end[3]; key += backward_block(inputs_)) {
          const int64_t count = smaller(backward_block(inputs_), smaller(task.end[3], span.key_count) - key);
          if (count <= 0) break;
          tiles_.load_keys(span, head / inputs_.group(), key, count, values_);
          for (int64_t query = task.begin[2]; query < task.end[2]; query += kBiasQueries) {
            add({span, head, 1, query, smaller(kBiasQueries, task.end[2] - query)});
          }
        }
      }
    }
    const int64_t* sizes = p_.dbias.sizes;
    const int64_t batch = sizes[0] == 1 ? 0 : task.begin[0], head = sizes[1] == 1 ? 0 : task.begin[1];
    const int64_t query = one_query_ ? 0 : task.begin[2], key = one_key_ ? 0 : task.begin[3];
    with_element_type<Vec>(p_.dbias.dtype, [&](auto element) {
      auto* to = static_cast<typename decltype(element)::type*>(p_.dbias.data) +
                 ((batch * sizes[1] + head) * sizes[2] + query) * sizes[3] + key;
      for (int64_t i = 0; i < rows; ++i) store_row<Vec>(sums_.row(i), to + i * sizes[3], columns);
    });
  }

 private:
  BiasGradient(const BackwardParams& p, const BackwardScratch& scratch, MatrixArena<Scalar> arena)
      : p_(p),
        inputs_(p.inputs),
        tiles_(p, scratch, arena),
        values_(arena.take(backward_block(p.inputs), p.inputs.value_dim)),
        sums_(arena.take(kBiasQueries, backward_block(p.inputs))) {}

  void add(const RowTile& tile) {
    tiles_.load_rows(tile, {});
    const int64_t strip = tiles_.strip_rows(tile);
    for (int64_t first = 0; first < tile.rows(); first += strip) {
      const int64_t last = smaller(tile.rows(), first + strip);
      const Columns columns = tiles_.columns(tile, first, last);
      if (columns.empty()) continue;
      tiles_.compute(tile, first, last, columns, true);
      for (int64_t row = first; row < last; ++row) add_row(tiles_.dscores.row(row), row, columns);
    }
  }

  void add_row(const Scalar* dscores, int64_t row, const Columns& columns) {
    Scalar* to = sums_.row(one_query_ ? 0 : row);
    if (!one_key_) {
      for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) {
        Vec::store(to + j, Vec::load(to + j, Full{}) + Vec::load(dscores + j, Full{}), Full{});
      }
      return;
    }
    Vec total = Vec::set(0);
    for (int64_t j = columns.begin; j < columns.end; j += Vec::lanes) total = total + Vec::load(dscores + j, Full{});
    to[0] += sum(total);
  }

  const BackwardParams& p_;
  const Inputs& inputs_;
  Gradients<Vec> tiles_;
  M values_;
  M sums_;
  bool one_query_ = false;
  bool one_key_ = false;
};

}  // namespace
}  // namespace inlay::attention
