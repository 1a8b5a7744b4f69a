// Tiles of rows, a row being one query of one head: how they lie in tensors, and which keys they see.
#pragma once

#include "attention/cpu/kernels.h"
#include "common/cpu/gemm.h"
#include "common/cpu/token_rows.h"

namespace inlay::attention {
namespace {

using namespace inlay::cpu;

INLAY_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
INLAY_INLINE int64_t round_down(int64_t value, int64_t multiple) { return value / multiple * multiple; }

// One sequence, its queries and its keys.
struct Span {
  INLAY_INLINE Span(const Inputs& inputs, int64_t sequence)
      : sequence(sequence),
        queries(inputs.queries[sequence]),
        keys(inputs.keys[sequence]),
        query_count(queries.end - queries.begin),
        key_count(inputs.key_count(sequence, keys)),
        diagonal(keys.end - keys.begin - query_count) {}

  INLAY_INLINE KeyRange visible(const Inputs& inputs, int64_t query) const {
    return inputs.visible(query, key_count, diagonal, queries.batch, queries.begin + query);
  }

  int64_t sequence;
  Sequence queries;
  Sequence keys;
  int64_t query_count;
  int64_t key_count;
  int64_t diagonal;
};

// Rows of `heads` query heads from `head` on: row r is query `query + r / heads` and head `head + r % heads`.
struct RowTile {
  const Span& span;
  int64_t head;
  int64_t heads;
  int64_t query;
  int64_t queries;

  INLAY_INLINE int64_t rows() const { return queries * heads; }
  INLAY_INLINE int64_t query_of(int64_t row) const { return query + row / heads; }
  INLAY_INLINE int64_t head_of(int64_t row) const { return head + row % heads; }
  INLAY_INLINE int64_t token_of(int64_t row) const { return span.queries.begin + query_of(row); }

  // Calls body(row, token, head) for every row.
  template <class Body>
  INLAY_INLINE void each(Body body) const {
    for (int64_t i = 0; i < queries; ++i) {
      for (int64_t g = 0; g < heads; ++g) body(i * heads + g, span.queries.begin + query + i, head + g);
    }
  }
};

// Rows of one tensor times a factor.
template <class Vec>
void load_tile(const TokenTensor& tensor, const RowTile& tile, int64_t width, typename Vec::Scalar factor,
               Matrix<typename Vec::Scalar> to) {
  const Vec times = Vec::set(factor);
  with_element_type<Vec>(tensor.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    tile.each([&](int64_t row, int64_t token, int64_t head) {
      const Element* from =
          static_cast<const Element*>(tensor.data) + tensor.offset(tile.span.queries.batch, token, head);
      // Rows may be pages apart, which the processor does not foresee. A hint, harmless beyond the last row.
      for (int64_t j = 0; j < width; j += kLineBytes / static_cast<int64_t>(sizeof(Element))) {
        __builtin_prefetch(from + kRowsAhead * tensor.token_stride + j);
      }
      typename Vec::Scalar* out = to.row(row);
      sweep<Vec>(width,
                 [&](int64_t j, auto lanes) { Vec::store(out + j, Vec::load(from + j, lanes) * times, Full{}); });
    });
  });
}

// The index of a row in a contiguous [B, Hq, Sq].
INLAY_INLINE int64_t row_index(const Inputs& inputs, const RowTile& tile, int64_t row) {
  return (tile.span.queries.batch * inputs.query_heads + tile.head_of(row)) * inputs.queries.tokens +
         tile.token_of(row);
}

// Which columns of a block of keys some rows see: [begin, end), counted from the block's first key, in whole vectors;
// `partial` where not every row sees every one.
struct Columns {
  int64_t begin = 0;
  int64_t end = 0;
  bool partial = false;

  INLAY_INLINE bool empty() const { return end <= begin; }
};

// Of rows [first, last), whose queries' ranges are in `ranges`; `count` keys are in the block.
template <class Vec>
INLAY_INLINE Columns columns_of(const KeyRange* ranges, int64_t first, int64_t last, int64_t heads, int64_t key,
                                int64_t count) {
  int64_t begin = count, end = 0, most = 0, least = count;
  for (int64_t i = first / heads; i <= (last - 1) / heads; ++i) {
    const int64_t own_begin = larger(0, ranges[i].begin - key), own_end = smaller(count, ranges[i].end - key);
    if (own_end > own_begin) {
      begin = smaller(begin, own_begin);
      end = larger(end, own_end);
    }
    most = larger(most, own_begin);
    least = smaller(least, own_end);
  }
  if (end <= begin) return {};
  const Columns columns{round_down(begin, Vec::lanes), round_up(end, Vec::lanes), false};
  return {columns.begin, columns.end, most > columns.begin || least < columns.end};
}

}  // namespace
}  // namespace inlay::attention
