// Backward of attention. A task is a block of keys, whose dK and dV it keeps, and walks over the tiles of rows that see
// any of them (gradients_impl.h):
//
//   dV += P^T dO;   dK += dS^T Q;   dQ += dS K
//
// dQ has a part from every block of keys. They are added in the order of the blocks, whichever thread is first: the
// sums are the same in every run, with any number of threads.
#pragma once

#include <sched.h>

#include "attention/cpu/gradients_impl.h"

namespace inlay::attention {
namespace {

template <class Vec>
class Backward {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  Backward(const BackwardParams& p, const BackwardScratch& scratch, void* memory)
      : Backward(p, scratch, MatrixArena<Scalar>(memory)) {}

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    return Gradients<Vec>::elements(inputs) + Arena::elements(backward_block(inputs), inputs.head_dim) +
           Arena::elements(backward_block(inputs), inputs.value_dim);
  }

  void run(const KeyTask& task) {
    const Span span(inputs_, task.sequence);
    const int64_t block = backward_block(inputs_), key = task.block * block;
    const int64_t stored = smaller(block, span.keys.end - span.keys.begin - key);
    const int64_t count = larger(0, smaller(stored, span.key_count - key));
    if (count > 0) tiles_.load_keys(span, task.key_head, key, count, dv_);
    for (int64_t i = 0; i < block; ++i) {
      fill_zero(dk_.row(i), round_up(inputs_.head_dim, Vec::lanes));
      fill_zero(dv_.row(i), round_up(inputs_.value_dim, Vec::lanes));
    }
    const int64_t group = inputs_.group(), queries = backward_queries(inputs_);
    int64_t number = inputs_.queries.first_chunk(task.sequence, queries);
    for (int64_t query = 0; query < span.query_count; query += queries, ++number) {
      const TileKeys& seen = scratch_.tiles[number];
      if (seen.any.begin >= key + count || seen.any.end <= key) continue;
      const RowTile tile{span, task.key_head * group, group, query, smaller(queries, span.query_count - query)};
      visit(tile, seen, task, scratch_.finished + number * inputs_.key_heads + task.key_head);
    }
    const int64_t row = span.keys.batch * inputs_.keys.tokens + span.keys.begin + key;
    const HeadRows dk{p_.dk, inputs_.key_heads, inputs_.head_dim, task.key_head};
    const HeadRows dv{p_.dv, inputs_.key_heads, inputs_.value_dim, task.key_head};
    store_tokens<Vec>(dk_, stored, dk, row, 0, inputs_.head_dim);
    store_tokens<Vec>(dv_, stored, dv, row, 0, inputs_.value_dim);
  }

 private:
  Backward(const BackwardParams& p, const BackwardScratch& scratch, MatrixArena<Scalar> arena)
      : p_(p),
        inputs_(p.inputs),
        scratch_(scratch),
        tiles_(p, scratch, arena),
        dk_(arena.take(backward_block(p.inputs), p.inputs.head_dim)),
        dv_(arena.take(backward_block(p.inputs), p.inputs.value_dim)) {}

  // `finished`: how many blocks of keys have added their part to the tile's dQ.
  void visit(const RowTile& tile, const TileKeys& seen, const KeyTask& task, int32_t* finished) {
    tiles_.load_rows(tile, seen.all);
    const M dq = tiles_.dq = tiles_.rows_of(scratch_.dq, tile, inputs_.head_dim);
    const int64_t strip = tiles_.strip_rows(tile);
    const int64_t dim = round_up(inputs_.head_dim, Vec::lanes), value_dim = round_up(inputs_.value_dim, Vec::lanes);
    each_strip(tile, strip, [&](int64_t first, int64_t rows, const Columns& columns) {
      tiles_.compute(tile, first, first + rows, columns, false);
      const int64_t width = columns.end - columns.begin;
      add_transposed({width, value_dim, rows, from_column(from_row(tiles_.probabilities, first), columns.begin),
                      from_row(tiles_.dout, first), from_row(dv_, columns.begin)});
      add_transposed({width, dim, rows, from_column(from_row(tiles_.dscores, first), columns.begin),
                      from_row(tiles_.q, first), from_row(dk_, columns.begin)});
    });
    const auto earlier = static_cast<int32_t>(task.block - seen.any.begin / backward_block(inputs_));
    while (__atomic_load_n(finished, __ATOMIC_ACQUIRE) != earlier) sched_yield();
    if (earlier == 0) {
      for (int64_t i = 0; i < tile.rows(); ++i) fill_zero(dq.row(i), dim);
    }
    each_strip(tile, strip, [&](int64_t first, int64_t rows, const Columns& columns) {
      GemmOperands<Scalar> product{rows,
                                   dim,
                                   columns.end - columns.begin,
                                   from_column(from_row(tiles_.dscores, first), columns.begin),
                                   from_row(tiles_.k, columns.begin),
                                   from_row(dq, first)};
      product.c_factor = 1;
      multiply<Vec>(product);
    });
    __atomic_store_n(finished, earlier + 1, __ATOMIC_RELEASE);
  }

  template <class Body>
  INLAY_INLINE void each_strip(const RowTile& tile, int64_t strip, Body body) {
    for (int64_t first = 0; first < tile.rows(); first += strip) {
      const int64_t last = smaller(tile.rows(), first + strip);
      const Columns columns = tiles_.columns(tile, first, last);
      if (!columns.empty()) body(first, last - first, columns);
    }
  }

  INLAY_INLINE static void add_transposed(GemmOperands<Scalar> product) {
    product.c_factor = 1;
    multiply_transposed<Vec>(product);
  }

  const BackwardParams& p_;
  const Inputs& inputs_;
  const BackwardScratch& scratch_;
  Gradients<Vec> tiles_;
  M dk_;
  M dv_;
};

// Once for each row: delta, the row of q and that of o's gradient, and dgate.
template <class Vec>
void prepare(const BackwardParams& p, const BackwardScratch& scratch, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  const Inputs& inputs = p.inputs;
  const int64_t tokens = inputs.queries.tokens, width = inputs.value_dim;
  const Scalar* dlse = static_cast<const Scalar*>(p.dlse.data);
  const Vec scale = Vec::set(static_cast<Scalar>(inputs.scale));
  with_element_type<Vec>(inputs.q.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    const auto row_of = [](const TokenTensor& tensor, int64_t batch, int64_t token, int64_t head) {
      return static_cast<const Element*>(tensor.data) + tensor.offset(batch, token, head);
    };
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / tokens, token = i % tokens;
      for (int64_t head = 0; head < inputs.query_heads; ++head) {
        const Element* dout = row_of(p.dout, batch, token, head);
        const Element* o = row_of(p.o, batch, token, head);
        const Element* gate = inputs.gate.data ? row_of(inputs.gate, batch, token, head) : nullptr;
        Element* dgate = gate ? static_cast<Element*>(p.dgate.data) + (i * inputs.query_heads + head) * width : nullptr;
        const int64_t group = inputs.group();
        const int64_t to = scratch_row(inputs, batch, head / group, token) + head % group;
        Scalar* packed = static_cast<Scalar*>(scratch.dout) + to * padded_stride<Scalar>(width);
        Vec total = Vec::set(0);
        sweep<Vec>(width, [&](int64_t j, auto lanes) {
          Vec gradient = Vec::load(dout + j, lanes);
          const Vec result = Vec::load(o + j, lanes);
          if (gate) {
            const Vec open = sigmoid(Vec::load(gate + j, lanes));
            gradient = gradient * open;
            Vec::store(dgate + j, gradient * result * (Vec::set(1) - open), lanes);
          }
          Vec::store(packed + j, gradient, Full{});
          total = fma(gradient, result, total);
        });
        const Element* q = row_of(inputs.q, batch, token, head);
        packed = static_cast<Scalar*>(scratch.q) + to * padded_stride<Scalar>(inputs.head_dim);
        sweep<Vec>(inputs.head_dim,
                   [&](int64_t j, auto lanes) { Vec::store(packed + j, Vec::load(q + j, lanes) * scale, Full{}); });
        const int64_t row = (batch * inputs.query_heads + head) * tokens + token;
        static_cast<Scalar*>(scratch.delta)[row] = sum(total) - (dlse ? dlse[row] : 0);
      }
    }
  });
}

template <class Vec>
void store_dq(const BackwardParams& p, const BackwardScratch& scratch, const QueryTask& task) {
  using Scalar = typename Vec::Scalar;
  const Inputs& inputs = p.inputs;
  const int64_t group = inputs.group(), width = inputs.head_dim, stride = padded_stride<Scalar>(width);
  const Span span(inputs, task.sequence);
  const int64_t number =
      inputs.queries.first_chunk(task.sequence, backward_queries(inputs)) + task.begin / backward_queries(inputs);
  const bool seen = !scratch.tiles[number].any.empty();
  const Vec scale = Vec::set(static_cast<Scalar>(inputs.scale));
  const RowTile tile{span, task.key_head * group, group, task.begin, task.count};
  const Scalar* dq = static_cast<const Scalar*>(scratch.dq) +
                     scratch_row(inputs, span.queries.batch, task.key_head, span.queries.begin + task.begin) * stride;
  with_element_type<Vec>(p.dq.dtype, [&](auto element) {
    using Element = typename decltype(element)::type;
    tile.each([&](int64_t row, int64_t token, int64_t head) {
      const int64_t index = (span.queries.batch * inputs.queries.tokens + token) * inputs.query_heads + head;
      Element* to = static_cast<Element*>(p.dq.data) + index * width;
      sweep<Vec>(width, [&](int64_t j, auto lanes) {
        Vec::store(to + j, seen ? Vec::load(dq + row * stride + j, Full{}) * scale : Vec::set(0), lanes);
      });
    });
  });
}

// A sink is a key without a value: its probability, times what is taken from every gradient.
template <class Vec>
void sink_gradient(const BackwardParams& p, const BackwardScratch& scratch, int64_t head) {
  using Scalar = typename Vec::Scalar;
  const Inputs& inputs = p.inputs;
  const Scalar sink = load_element<Vec>(inputs.sinks, head);
  const int64_t tokens = inputs.queries.tokens;
  double total = 0;
  for (int64_t batch = 0; batch < inputs.batch; ++batch) {
    const int64_t row = (batch * inputs.query_heads + head) * tokens;
    const Scalar* lse = static_cast<const Scalar*>(p.lse.data) + row;
    const Scalar* delta = static_cast<const Scalar*>(scratch.delta) + row;
    for (int64_t i = 0; i < tokens; ++i) {
      if (lse[i] == kMinusInfinity<Scalar>) continue;
      total -= static_cast<double>(exp_of<Vec>(sink - lse[i])) * static_cast<double>(delta[i]);
    }
  }
  store_number<Vec>(static_cast<Scalar>(total), p.dsinks, head);
}

}  // namespace
}  // namespace inlay::attention
