// Forward of the gated delta rule by chunks. For a chunk with the state S [K, V] before it, and the matrices of
// chunk_impl.h:
//
//   R = V - exp(c) * (K S)          what the state lacks to give the values
//   U = B R                         what each token writes
//   O = scale * exp(c) * (Q S) + P U
//   S <- exp(c_last) S + K^T (exp(c_last - c) * U)
//
// A task walks over the chunks of one head of one sequence with S in the cache. Columns of V do not see each other, so
// tasks may share a head by columns.
#pragma once

#include "gdn/cpu/chunk_impl.h"

namespace inlay::gdn {
namespace {

// The state before each chunk of one head, to be kept for the backward.
template <class Scalar>
struct StateLog {
  Scalar* data = nullptr;  // of the task's first chunk; null: not wanted
  int64_t chunk_stride = 0;
  int64_t row_stride = 0;

  Matrix<Scalar> at(int64_t chunk) const { return {data + chunk * chunk_stride, row_stride}; }
};

template <class Vec>
class ChunkForward {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  ChunkForward(const Inputs& inputs, void* memory) : ChunkForward(inputs, MatrixArena<Scalar>(memory)) {}

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    return Chunk<Vec>::elements(inputs) + Arena::elements(inputs.key_dim, inputs.value_dim) +
           3 * Arena::elements(kChunk, inputs.value_dim) + Arena::elements(1, kChunk);
  }

  M state() const { return state_; }  // [K, width], to be set before `run`

  // `o` absent: only the states matter, and that of the end is not needed.
  void run(const Task& task, const OutputTensor& o, const StateLog<Scalar>& log) {
    const Sequence sequence = inputs_.sequences[task.sequence];
    const int64_t chunks = chunks_of(sequence);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (log.data) {
        copy_state(task, log.at(chunk));
        if (!o.data && chunk + 1 == chunks) return;
      }
      run_chunk(task, chunk_span<Vec>(sequence, chunk), o);
    }
  }

 private:
  ChunkForward(const Inputs& inputs, MatrixArena<Scalar> arena)
      : inputs_(inputs),
        chunk_(inputs, arena),
        state_(arena.take(inputs.key_dim, inputs.value_dim)),
        rest_(arena.take(kChunk, inputs.value_dim)),
        update_(arena.take(kChunk, inputs.value_dim)),
        o_(arena.take(kChunk, inputs.value_dim)),
        read_factor_(arena.take_row(kChunk)) {}

  void copy_state(const Task& task, M to) {
    for (int64_t i = 0; i < inputs_.key_dim; ++i) {
      for (int64_t j = 0; j < task.width; j += Vec::lanes) {
        Vec::store(to.row(i) + j, Vec::load(state_.row(i) + j, Full{}), Full{});
      }
    }
  }

  void run_chunk(const Task& task, const Span& span, const OutputTensor& o) {
    const bool with_queries = o.data != nullptr;
    const int64_t keys = inputs_.key_dim, rows = span.padded, width = round_up(task.width, Vec::lanes);
    chunk_.prepare(span, task.head, with_queries);

    multiply<Vec>({rows, width, keys, chunk_.k, state_, update_});
    load_tokens<Vec>(inputs_.v, span.batch, span.token, task.head, task.column, task.width, span.count, rows, rest_);
    for (int64_t i = 0; i < rows; ++i) {
      const Vec factor = Vec::set(-chunk_.from_start[i]);
      for (int64_t j = 0; j < width; j += Vec::lanes) {
        const Vec known = Vec::load(update_.row(i) + j, Full{});
        Vec::store(rest_.row(i) + j, fma(factor, known, Vec::load(rest_.row(i) + j, Full{})), Full{});
      }
    }
    multiply<Vec>({rows, width, rows, chunk_.b, rest_, update_, 0, Band::lower});

    if (with_queries) {
      multiply<Vec>({rows, width, keys, chunk_.q, state_, o_});
      const Scalar scale = static_cast<Scalar>(inputs_.scale);
      for (int64_t i = 0; i < rows; ++i) read_factor_[i] = scale * chunk_.from_start[i];
      scale_rows<Vec>(o_, read_factor_, o_, rows, width);
      multiply<Vec>({rows, width, rows, chunk_.p, update_, o_, 1, Band::lower});
      const HeadRows to{o, inputs_.value_heads, inputs_.value_dim, task.head};
      const int64_t row = span.batch * inputs_.sequences.tokens + span.token;
      store_tokens<Vec>(o_, span.count, to, row, task.column, task.width);
    }

    scale_rows<Vec>(update_, chunk_.to_end, update_, rows, width);
    multiply_transposed<Vec>({keys, width, rows, chunk_.k, update_, state_, chunk_.whole});
  }

  const Inputs& inputs_;
  Chunk<Vec> chunk_;
  M state_;
  M rest_;    // R
  M update_;  // K S, then U
  M o_;
  Scalar* read_factor_;
};

}  // namespace
}  // namespace inlay::gdn
