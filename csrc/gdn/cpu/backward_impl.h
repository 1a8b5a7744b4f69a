// Backward of the gated delta rule by chunks, from the last to the first. With the forward's matrices (forward_impl.h),
// dO, and the gradient dS of the state behind the chunk:
//
//   dU = P^T dO + exp(c_last - c) * (K dS)         dR = B^T dU         dV = dR
//   dB = dU R^T    dP = dO U^T    Y = scale * D * dP
//   dQ = scale * exp(c) * (dO S^T) + Y K
//   dK = exp(c_last - c) * (U dS^T) - exp(c) * (dR S^T) + Y^T Q + (N + N^T) K
//   dS <- exp(c_last) dS + Q^T (scale * exp(c) * dO) - K^T (exp(c) * dR)
//
// with N = diag(beta) Z and Z = -tril(inverse^T dA inverse^T, -1), dA = dB * D * beta_j, from the inverse;
//
//   dbeta_j = sum_i (dB * D * inverse)_ij + sum_i<j (Z * K K^T)_ji
//
// The gate of token t decays everything that crosses from before t to t or later, and its gradient is the sum of all
// those: of E = dP * P + dB * B over i >= t > j, of what tokens i >= t read from the state before the chunk, of what
// tokens i < t give to the state behind it, and of what is left of the former in the latter. Every term is a product
// with its own decay, so that nothing has to cancel.
#pragma once

#include "gdn/cpu/forward_impl.h"

namespace inlay::gdn {
namespace {

template <class Vec>
class ChunkBackward {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  ChunkBackward(const BackwardParams& p, const BackwardScratch& scratch, void* memory)
      : ChunkBackward(p, scratch, MatrixArena<Scalar>(memory)) {}

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    const int64_t keys = inputs.key_dim, values = inputs.value_dim;
    return Chunk<Vec>::elements(inputs) + Arena::elements(keys, values) + 2 * Arena::elements(values, keys) +
           6 * Arena::elements(kChunk, values) + 2 * Arena::elements(values, kChunk) +
           2 * Arena::elements(kChunk, keys) + 4 * Arena::elements(kChunk, kChunk) + 6 * Arena::elements(1, kChunk);
  }

  // The state before each chunk is in the scratch memory.
  void run(const Task& task, const StateLog<Scalar>& log) {
    const Sequence sequence = inputs_.sequences[task.sequence];
    load_state<Vec>(p_.dfinal_state, task.sequence, task.head, 0, values_, values_, keys_, dstate_);
    for (int64_t chunk = chunks_of(sequence) - 1; chunk >= 0; --chunk) {
      run_chunk(task.head, chunk_span<Vec>(sequence, chunk), log.at(chunk));
    }
    if (p_.dinitial_state.data) {
      store_state<Vec>(dstate_, keys_, p_.dinitial_state, task.sequence, task.head, 0, values_, values_);
    }
  }

 private:
  ChunkBackward(const BackwardParams& p, const BackwardScratch& scratch, MatrixArena<Scalar> arena)
      : p_(p),
        inputs_(p.inputs),
        scratch_(scratch),
        keys_(inputs_.key_dim),
        values_(inputs_.value_dim),
        chunk_(inputs_, arena),
        dstate_(arena.take(keys_, values_)),
        dstate_transposed_(arena.take(values_, keys_)),
        state_transposed_(arena.take(values_, keys_)),
        known_(arena.take(kChunk, values_)),
        rest_(arena.take(kChunk, values_)),
        update_(arena.take(kChunk, values_)),
        dout_(arena.take(kChunk, values_)),
        dupdate_(arena.take(kChunk, values_)),
        drest_(arena.take(kChunk, values_)),
        rest_transposed_(arena.take(values_, kChunk)),
        update_transposed_(arena.take(values_, kChunk)),
        dq_(arena.take(kChunk, keys_)),
        dk_(arena.take(kChunk, keys_)),
        dp_(arena.take(kChunk, kChunk)),
        db_(arena.take(kChunk, kChunk)),
        inverse_transposed_(arena.take(kChunk, kChunk)),
        product_(arena.take(kChunk, kChunk)),
        factor_(arena.take_row(kChunk)),
        reads_(arena.take_row(kChunk)),
        gives_(arena.take_row(kChunk)),
        dgate_(arena.take_row(kChunk)),
        dbeta_(arena.take_row(kChunk)),
        crossing_(arena.take_row(kChunk)) {}

  void run_chunk(int64_t head, const Span& span, M state) {
    chunk_.prepare(span, head, true);
    recompute_updates(head, span, state);
    differentiate_updates(head, span);
    differentiate_scores(span);
    differentiate_inverse(span);
    differentiate_keys(span, state);
    store(head, span);
  }

  // R and U, as the forward had them.
  void recompute_updates(int64_t head, const Span& span, M state) {
    const int64_t rows = span.padded, width = padded(values_);
    multiply<Vec>({rows, width, keys_, chunk_.k, state, known_});
    scale_rows<Vec>(known_, chunk_.from_start, known_, rows, width);
    load_tokens<Vec>(inputs_.v, span.batch, span.token, head, 0, values_, span.count, rows, rest_);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < width; j += Vec::lanes) {
        const Vec rest = Vec::load(rest_.row(i) + j, Full{}) - Vec::load(known_.row(i) + j, Full{});
        Vec::store(rest_.row(i) + j, rest, Full{});
      }
    }
    multiply<Vec>({rows, width, rows, chunk_.b, rest_, update_, 0, Band::lower});
  }

  // dU, dR and dV.
  void differentiate_updates(int64_t head, const Span& span) {
    const int64_t rows = span.padded, width = padded(values_);
    load_tokens<Vec>(p_.dout, span.batch, span.token, head, 0, values_, span.count, rows, dout_);
    multiply<Vec>({rows, width, keys_, chunk_.k, dstate_, dupdate_});
    scale_rows<Vec>(dupdate_, chunk_.to_end, dupdate_, rows, width);
    multiply_transposed<Vec>({rows, width, rows, chunk_.p, dout_, dupdate_, 1, Band::upper});
    multiply_transposed<Vec>({rows, width, rows, chunk_.b, dupdate_, drest_, 0, Band::upper});
    store_tokens<Vec>(drest_, span.count, {p_.dv, inputs_.value_heads, values_, head}, row_of(span), 0, values_);
    for (int64_t i = 0; i < rows; ++i) reads_[i] = -dot<Vec>(known_.row(i), drest_.row(i), width);
  }

  // dP and dB, which become Y and dA; the parts of dbeta and of the gates' gradients that come through B and P.
  void differentiate_scores(const Span& span) {
    const int64_t rows = span.padded;
    transpose<Vec>(update_, update_transposed_, rows, values_);
    transpose<Vec>(rest_, rest_transposed_, rows, values_);
    GemmOperands<Scalar> product{rows, rows, values_, dout_, update_transposed_, dp_};
    product.wanted = Wanted::lower;
    multiply<Vec>(product);
    product.a = dupdate_;
    product.b = rest_transposed_;
    product.c = db_;
    multiply<Vec>(product);

    const Vec scale = Vec::set(static_cast<Scalar>(inputs_.scale));
    fill_zero(dbeta_, rows);
    fill_zero(crossing_, rows);
    for (int64_t i = rows - 1; i >= 0; --i) {
      Vec crossing = Vec::set(0);
      sweep_lower<Vec>(i, [&](int64_t j, auto lanes) {
        const Vec decay = Vec::load(chunk_.decay.row(i) + j, Full{});
        const Vec dp = Vec::keep(Vec::load(dp_.row(i) + j, Full{}), lanes);
        const Vec db = Vec::keep(Vec::load(db_.row(i) + j, Full{}), lanes);
        const Vec gated = db * decay;
        Vec::store(dbeta_ + j, fma(gated, Vec::load(chunk_.inverse.row(i) + j, Full{}), Vec::load(dbeta_ + j, Full{})),
                   Full{});
        const Vec e = fma(dp, Vec::load(chunk_.p.row(i) + j, Full{}), db * Vec::load(chunk_.b.row(i) + j, Full{}));
        Vec::store(crossing_ + j, e + Vec::load(crossing_ + j, Full{}), Full{});
        Vec::store(dp_.row(i) + j, scale * decay * dp, Full{});
        Vec::store(db_.row(i) + j, gated * Vec::load(chunk_.beta + j, Full{}), Full{});
      });
      const int64_t done = round_up(i + 1, Vec::lanes);
      fill_zero(dp_.row(i) + done, rows - done);
      fill_zero(db_.row(i) + done, rows - done);
      // crossing_[j] is now the sum of E_kj over k >= i: what token i's gate decays is that of all j < i.
      if (i > 0) {
        sweep<Vec>(i, [&](int64_t j, auto lanes) {
          crossing = crossing + Vec::keep(Vec::load(crossing_ + j, Full{}), lanes);
        });
      }
      dgate_[i] = sum(crossing);
    }
  }

  // N, into product_; the part of dbeta that comes through the inverse.
  void differentiate_inverse(const Span& span) {
    const int64_t rows = span.padded;
    transpose<Vec>(chunk_.inverse, inverse_transposed_, rows, rows);
    multiply_transposed<Vec>({rows, rows, rows, chunk_.inverse, db_, product_, 0, Band::upper, Wanted::lower});
    // Only the lower triangle of the product is right, and all that is read: the other factor is zero where it is not.
    for (int64_t i = 0; i < rows; ++i) {
      sweep_lower<Vec>(i, [&](int64_t j, auto lanes) {
        Vec::store(product_.row(i) + j, Vec::keep(Vec::load(product_.row(i) + j, Full{}), lanes), Full{});
      });
      const int64_t done = round_up(i + 1, Vec::lanes);
      fill_zero(product_.row(i) + done, rows - done);
    }
    multiply<Vec>({rows, rows, rows, product_, inverse_transposed_, db_, 0, Band::lower, Wanted::lower});
    for (int64_t i = 0; i < rows; ++i) {
      const Vec minus_beta = Vec::set(-chunk_.beta[i]);
      Vec through_inverse = Vec::set(0);
      if (i > 0) {
        sweep<Vec>(i, [&](int64_t j, auto lanes) {
          const Vec z = Vec::keep(Vec::load(db_.row(i) + j, Full{}), lanes);
          const Vec keys = Vec::keep(Vec::load(chunk_.products_k.row(i) + j, Full{}), lanes);
          through_inverse = fma(z, keys, through_inverse);
          Vec::store(product_.row(i) + j, z * minus_beta, Full{});
        });
      }
      const int64_t done = round_up(i, Vec::lanes);
      fill_zero(product_.row(i) + done, rows - done);
      dbeta_[i] -= sum(through_inverse);
    }
  }

  // dQ, dK and the state's gradient; the parts of the gates' gradients that come through the states.
  void differentiate_keys(const Span& span, M state) {
    const int64_t rows = span.padded, width = padded(keys_);
    transpose<Vec>(state, state_transposed_, keys_, values_);
    transpose<Vec>(dstate_, dstate_transposed_, keys_, values_);

    const Scalar scale = static_cast<Scalar>(inputs_.scale);
    for (int64_t i = 0; i < rows; ++i) factor_[i] = scale * chunk_.from_start[i];
    scale_rows<Vec>(dout_, factor_, dout_, rows, padded(values_));
    multiply<Vec>({rows, width, values_, dout_, state_transposed_, dq_});
    for (int64_t i = 0; i < rows; ++i) reads_[i] += dot<Vec>(chunk_.q.row(i), dq_.row(i), width);
    multiply<Vec>({rows, width, rows, dp_, chunk_.k, dq_, 1, Band::lower});

    scale_rows<Vec>(update_, chunk_.to_end, update_, rows, padded(values_));
    multiply<Vec>({rows, width, values_, update_, dstate_transposed_, dk_});
    for (int64_t i = 0; i < rows; ++i) gives_[i] = dot<Vec>(chunk_.k.row(i), dk_.row(i), width);
    for (int64_t i = 0; i < rows; ++i) factor_[i] = -chunk_.from_start[i];
    scale_rows<Vec>(drest_, factor_, drest_, rows, padded(values_));
    multiply<Vec>({rows, width, values_, drest_, state_transposed_, dk_, 1});
    multiply_transposed<Vec>({rows, width, rows, dp_, chunk_.q, dk_, 1, Band::upper});
    multiply<Vec>({rows, width, rows, product_, chunk_.k, dk_, 1, Band::lower});
    multiply_transposed<Vec>({rows, width, rows, product_, chunk_.k, dk_, 1, Band::upper});

    Scalar passing = 0;  // from the state before the chunk to that behind it
    for (int64_t i = 0; i < keys_; ++i) passing += dot<Vec>(state.row(i), dstate_.row(i), padded(values_));
    passing *= chunk_.whole;
    Scalar given = 0;
    for (int64_t i = 0; i < rows; ++i) {
      dgate_[i] += given + passing;
      given += gives_[i];
    }
    Scalar read = 0;
    for (int64_t i = rows - 1; i >= 0; --i) {
      read += reads_[i];
      dgate_[i] += read;
    }

    multiply_transposed<Vec>({keys_, padded(values_), rows, chunk_.q, dout_, dstate_, chunk_.whole});
    multiply_transposed<Vec>({keys_, padded(values_), rows, chunk_.k, drest_, dstate_, 1});
  }

  void store(int64_t head, const Span& span) {
    const int64_t row = row_of(span);
    for (int64_t i = 0; i < span.count; ++i) {
      const int64_t index = (row + i) * inputs_.value_heads + head;
      store_number<Vec>(dgate_[i], p_.dg, index);
      store_number<Vec>(dbeta_[i], p_.dbeta, index);
    }
    if (inputs_.group() > 1) {
      const DType wide = p_.dg.dtype;
      store_tokens<Vec>(dq_, span.count, {{scratch_.dq, wide}, inputs_.value_heads, keys_, head}, row, 0, keys_);
      store_tokens<Vec>(dk_, span.count, {{scratch_.dk, wide}, inputs_.value_heads, keys_, head}, row, 0, keys_);
      return;
    }
    for (int64_t i = 0; inputs_.l2norm_qk && i < span.count; ++i) {
      normalise_backward<Vec>(chunk_.q.row(i), chunk_.q_factor[i], dq_.row(i), keys_);
      normalise_backward<Vec>(chunk_.k.row(i), chunk_.k_factor[i], dk_.row(i), keys_);
    }
    store_tokens<Vec>(dq_, span.count, {p_.dq, inputs_.key_heads, keys_, head}, row, 0, keys_);
    store_tokens<Vec>(dk_, span.count, {p_.dk, inputs_.key_heads, keys_, head}, row, 0, keys_);
  }

  static int64_t padded(int64_t width) { return round_up(width, Vec::lanes); }
  int64_t row_of(const Span& span) const { return span.batch * inputs_.sequences.tokens + span.token; }

  const BackwardParams& p_;
  const Inputs& inputs_;
  const BackwardScratch& scratch_;
  int64_t keys_, values_;
  Chunk<Vec> chunk_;
  M dstate_, dstate_transposed_, state_transposed_;
  M known_;            // exp(c) * (K S)
  M rest_, update_;    // R, U; U is decayed to the chunk's end later on
  M dout_;             // dO, later times scale * exp(c)
  M dupdate_, drest_;  // dU, dR; dR later times -exp(c)
  M rest_transposed_, update_transposed_;
  M dq_, dk_;
  M dp_, db_;  // dP, then Y; dB, then dA, then -Z
  M inverse_transposed_;
  M product_;  // inverse^T dA, then N
  Scalar* factor_;
  Scalar* reads_;  // what the gradient of token i's reads of the state before the chunk adds to all gates up to i
  Scalar* gives_;  // the same of what it gives to the state behind it, to all later gates
  Scalar* dgate_;
  Scalar* dbeta_;
  Scalar* crossing_;
};

// dq and dk of each token and key head: the sum of its value heads', in order, through the normalisation.
template <class Vec>
void sum_group(const BackwardParams& p, const BackwardScratch& scratch, int64_t begin, int64_t end, void* memory) {
  using Scalar = typename Vec::Scalar;
  const Inputs& inputs = p.inputs;
  const int64_t width = inputs.key_dim, group = inputs.group(), tokens = inputs.sequences.tokens;
  MatrixArena<Scalar> arena(memory);
  const Matrix<Scalar> x = arena.take(1, width), total = arena.take(1, width);
  const auto sum_rows = [&](const TokenTensor& input, const void* partials, const OutputTensor& output, int64_t row,
                            int64_t key_head) {
    const Scalar* from = static_cast<const Scalar*>(partials) + (row * inputs.value_heads + key_head * group) * width;
    sweep<Vec>(width, [&](int64_t j, auto lanes) {
      Vec gradient = Vec::load(from + j, lanes);
      for (int64_t i = 1; i < group; ++i) gradient = gradient + Vec::load(from + i * width + j, lanes);
      Vec::store(total.data + j, gradient, Full{});
    });
    if (inputs.l2norm_qk) {
      load_tokens<Vec>(input, row / tokens, row % tokens, key_head, 0, width, 1, 1, x);
      const Scalar factor = normalise<Vec>(x.data, width);
      normalise_backward<Vec>(x.data, factor, total.data, width);
    }
    store_tokens<Vec>(total, 1, {output, inputs.key_heads, width, key_head}, row, 0, width);
  };
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t key_head = 0; key_head < inputs.key_heads; ++key_head) {
      sum_rows(inputs.q, scratch.dq, p.dq, row, key_head);
      sum_rows(inputs.k, scratch.dk, p.dk, row, key_head);
    }
  }
}

}  // namespace
}  // namespace inlay::gdn
