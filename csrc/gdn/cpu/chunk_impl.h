// What the forward and the backward compute of a chunk before they look at the state. For its C <= kChunk tokens i, j,
// with c the cumulated log decays and D_ij = exp(c_i - c_j) for i >= j, else 0:
//
//   inverse = (1 + diag(beta) tril(K K^T, -1))^-1          no decay in it: it multiplies the inverse, element by
//   element B = inverse * D * beta_j                               so that u = B (V - exp(c) * K S) is what is written
//   P = scale * Q K^T * D
//
// A chunk of fewer tokens is padded with rows of zeros to whole vectors: zero keys, values and betas add nothing.
#pragma once

#include "gdn/cpu/rows_impl.h"

namespace inlay::gdn {
namespace {

// Where a chunk lies.
struct Span {
  int64_t batch;
  int64_t token;   // the first one
  int64_t count;   // 1 to kChunk
  int64_t padded;  // count in whole vectors
};

template <class Vec>
INLAY_INLINE Span chunk_span(const Sequence& sequence, int64_t chunk) {
  const int64_t token = sequence.begin + chunk * kChunk;
  const int64_t count = smaller(kChunk, sequence.end - token);
  return {sequence.batch, token, count, round_up(count, Vec::lanes)};
}

INLAY_INLINE int64_t chunks_of(const Sequence& sequence) {
  return (sequence.end - sequence.begin + kChunk - 1) / kChunk;
}

// Calls body(j, lanes) for the vectors of row i of a lower triangular matrix: Partial where the diagonal cuts one.
template <class Vec, class Body>
INLAY_INLINE void sweep_lower(int64_t i, Body body) {
  sweep<Vec>(i + 1, body);
}

template <class Vec>
class Chunk {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  Chunk(const Inputs& inputs, MatrixArena<Scalar>& arena)
      : q(arena.take(kChunk, inputs.key_dim)),
        k(arena.take(kChunk, inputs.key_dim)),
        products_k(arena.take(kChunk, kChunk)),
        decay(arena.take(kChunk, kChunk)),
        inverse(arena.take(kChunk, kChunk)),
        b(arena.take(kChunk, kChunk)),
        p(arena.take(kChunk, kChunk)),
        beta(arena.take_row(kChunk)),
        from_start(arena.take_row(kChunk)),
        to_end(arena.take_row(kChunk)),
        q_factor(arena.take_row(kChunk)),
        k_factor(arena.take_row(kChunk)),
        inputs_(inputs),
        k_transposed_(arena.take(inputs.key_dim, kChunk)),
        total_(arena.take_row(kChunk)),
        total_rest_(arena.take_row(kChunk)) {}

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    return 2 * Arena::elements(kChunk, inputs.key_dim) + Arena::elements(inputs.key_dim, kChunk) +
           5 * Arena::elements(kChunk, kChunk) + 7 * Arena::elements(1, kChunk);
  }

  // `with_queries`: q and P as well.
  void prepare(const Span& span, int64_t head, bool with_queries) {
    const int64_t key_head = head / inputs_.group();
    load_keys(inputs_.k, span, key_head, k, k_factor);
    transpose<Vec>(k, k_transposed_, span.padded, inputs_.key_dim);
    multiply_by_keys(span, k, products_k);
    if (with_queries) {
      load_keys(inputs_.q, span, key_head, q, q_factor);
      multiply_by_keys(span, q, p);
    }
    load_gates(span, head);
    invert(span);
    for (int64_t i = 0; i < span.padded; ++i) {
      decay_row(span, i, with_queries);
    }
  }

  M q, k;        // [kChunk, K], normalised where asked for
  M products_k;  // K K^T, its lower triangle
  M decay;       // D
  M inverse;
  M b, p;
  Scalar* beta;
  Scalar* from_start;  // exp(c_i): the decay that the state before the chunk has seen
  Scalar* to_end;      // exp(c_last - c_i): the decay that token i's update sees in this chunk
  Scalar* q_factor;    // what rows of q and k were multiplied by to normalise them
  Scalar* k_factor;
  Scalar whole;  // exp(c_last)

 private:
  void load_keys(const TokenTensor& tensor, const Span& span, int64_t key_head, M to, Scalar* factors) {
    const int64_t width = inputs_.key_dim;
    load_tokens<Vec>(tensor, span.batch, span.token, key_head, 0, width, span.count, span.padded, to);
    if (!inputs_.l2norm_qk) return;
    for (int64_t i = 0; i < span.count; ++i) factors[i] = normalise<Vec>(to.row(i), width);
  }

  void multiply_by_keys(const Span& span, M left, M to) {
    GemmOperands<Scalar> product{span.padded, span.padded, inputs_.key_dim, left, k_transposed_, to};
    product.wanted = Wanted::lower;
    multiply<Vec>(product);
  }

  // Differences of the cumulated decays must be right to the last digit however large the sums are, so these are kept
  // in two parts: the rounded sum, and what the rounding took.
  void load_gates(const Span& span, int64_t head) {
    double sum = 0;
    for (int64_t i = 0; i < span.padded; ++i) {
      const bool real = i < span.count;
      if (real) sum += load_gate<Vec>(inputs_.g, span.batch, span.token + i, head);
      beta[i] = real ? load_number<Vec>(inputs_.beta, span.batch, span.token + i, head) : 0;
      total_[i] = static_cast<Scalar>(sum);
      total_rest_[i] = static_cast<Scalar>(sum - static_cast<double>(total_[i]));
    }
    const int64_t last = span.padded - 1;
    const Vec end = Vec::set(total_[last]), end_rest = Vec::set(total_rest_[last]);
    for (int64_t j = 0; j < span.padded; j += Vec::lanes) {
      const Vec total = Vec::load(total_ + j, Full{}), rest = Vec::load(total_rest_ + j, Full{});
      Vec::store(from_start + j, exp_of_sum(total, rest), Full{});
      Vec::store(to_end + j, exp_of_sum(end - total, end_rest - rest), Full{});
    }
    whole = from_start[last];
  }

  // e^(a + b) for a tiny b.
  INLAY_INLINE static Vec exp_of_sum(Vec a, Vec b) {
    const Vec power = exp(a);
    return fma(power, b, power);
  }

  // Row by row: row i of the inverse is e_i minus the rows above it, each times X_ij = beta_i K_i K_j.
  void invert(const Span& span) {
    constexpr int64_t vectors = 4;
    for (int64_t i = 0; i < span.padded; ++i) {
      Scalar* row = inverse.row(i);
      fill_zero(row, kChunk);
      const Scalar factor = -beta[i];
      for (int64_t column = 0; column < i; column += vectors * Vec::lanes) {
        Vec sums[vectors];
        for (Vec& sum : sums) sum = Vec::set(0);
        for (int64_t j = column; j < i; ++j) {  // rows before that are zero in these columns
          const Vec x = Vec::set(factor * products_k.row(i)[j]);
          const Scalar* above = inverse.row(j) + column;
          for (int64_t v = 0; v < vectors; ++v) sums[v] = fma(x, Vec::load(above + v * Vec::lanes, Full{}), sums[v]);
        }
        for (int64_t v = 0; v < vectors; ++v) Vec::store(row + column + v * Vec::lanes, sums[v], Full{});
      }
      row[i] = 1;
    }
  }

  // Row i of D, B and P. Above the diagonal differences are positive, their exponentials may be infinite and the
  // products hold anything: `keep` sets zeros there whatever was computed.
  void decay_row(const Span& span, int64_t i, bool with_queries) {
    const Vec total = Vec::set(total_[i]), rest = Vec::set(total_rest_[i]);
    const Vec scale = Vec::set(static_cast<Scalar>(inputs_.scale));
    sweep_lower<Vec>(i, [&](int64_t j, auto lanes) {
      const Vec decayed = exp_of_sum(total - Vec::load(total_ + j, Full{}), rest - Vec::load(total_rest_ + j, Full{}));
      Vec::store(decay.row(i) + j, Vec::keep(decayed, lanes), Full{});
      const Vec gated = Vec::load(inverse.row(i) + j, Full{}) * decayed * Vec::load(beta + j, Full{});
      Vec::store(b.row(i) + j, Vec::keep(gated, lanes), Full{});
      if (with_queries) {
        const Vec score = Vec::load(p.row(i) + j, Full{}) * decayed * scale;
        Vec::store(p.row(i) + j, Vec::keep(score, lanes), Full{});
      }
    });
    const int64_t done = round_up(i + 1, Vec::lanes);
    fill_zero(decay.row(i) + done, span.padded - done);
    fill_zero(b.row(i) + done, span.padded - done);
    if (with_queries) fill_zero(p.row(i) + done, span.padded - done);
  }

  const Inputs& inputs_;
  M k_transposed_;  // [K, kChunk]
  Scalar* total_;   // c
  Scalar* total_rest_;
};

}  // namespace
}  // namespace inlay::gdn
