// The gated delta rule token by token, for few tokens:
//
//   u = beta (v - exp(g) S^T k)
//   S <- exp(g) S + k u^T
//   o = scale S^T q
//
// The state passes by twice per token, in blocks of whole rows, as it lies in memory. The first token reads it where it
// is and the last one writes it where it is wanted; between tokens it is in the cache, in full precision.
#pragma once

#include "gdn/cpu/rows_impl.h"

namespace inlay::gdn {
namespace {

// What the token loop reads and writes besides the inputs.
struct RecurrentStates {
  StateTensor before;
  StateTensor after;   // may be the same memory as `before`
  OutputTensor every;  // [B, T, Hv, K, V], the state after each token; or not wanted
};

template <class Vec>
class Recurrent {
 public:
  using Scalar = typename Vec::Scalar;

  Recurrent(const Inputs& inputs, void* memory) : inputs_(inputs) {
    MatrixArena<Scalar> arena(memory);
    state_ = arena.take(inputs.key_dim, inputs.value_dim);
    q_ = arena.take_row(inputs.key_dim);
    k_ = arena.take_row(inputs.key_dim);
    update_ = arena.take_row(inputs.value_dim);
    sums_ = arena.take_row(inputs.value_dim);
  }

  static int64_t elements(const Inputs& inputs) {
    using Arena = MatrixArena<Scalar>;
    return Arena::elements(inputs.key_dim + 2, inputs.value_dim) + 2 * Arena::elements(1, inputs.key_dim);
  }

  void run(const Task& task, const RecurrentStates& states, const OutputTensor& o) {
    const int64_t keys = inputs_.key_dim, values = inputs_.value_dim, width = task.width;
    const Sequence sequence = inputs_.sequences[task.sequence];
    // States as matrices of the task's columns.
    const StateView here{state_.data, wide(), state_.stride};
    const StateView before = states.before.data ? view(states.before, task) : here;
    const StateView after = states.after.data ? view(states.after, task) : here;
    if (!states.before.data) {
      for (int64_t i = 0; i < keys; ++i) fill_zero(state_.row(i), width);
    }
    if (sequence.begin == sequence.end) copy(before, after, width);

    for (int64_t token = sequence.begin; token < sequence.end; ++token) {
      const int64_t row = sequence.batch * inputs_.sequences.tokens + token;
      const bool last = token + 1 == sequence.end;
      const StateView from = token == sequence.begin ? before : here;
      const StateView to = last && !states.every.data ? after : here;
      load_token(task, sequence.batch, token);
      read(from, width);
      write(from, to, width);
      with_element_type<Vec>(o.dtype, [&](auto element) {
        auto* data = static_cast<typename decltype(element)::type*>(o.data);
        store_row<Vec>(sums_, data + (row * inputs_.value_heads + task.head) * values + task.column, width);
      });
      if (states.every.data) {
        const int64_t size = keys * values;
        copy(here,
             view({states.every.data, states.every.dtype, inputs_.value_heads * size, size},
                  {row, task.head, task.column, width}),
             width);
        if (last) copy(here, after, width);
      }
    }
  }

 private:
  static constexpr int64_t kReadRows = 8;  // of the state at a time; they divide kHeadDimMultiple
  static constexpr int64_t kWriteRows = 4;

  struct StateView {
    void* data;
    DType dtype;
    int64_t stride;
  };

  static constexpr DType wide() { return sizeof(Scalar) == sizeof(double) ? DType::f64 : DType::f32; }

  StateView view(const StateTensor& tensor, const Task& task) const {
    const int64_t offset = tensor.offset(task.sequence, task.head) + task.column;
    return {static_cast<char*>(tensor.data) + offset * size_of(tensor.dtype), tensor.dtype, inputs_.value_dim};
  }

  // Calls body(data) with the view's pointer in its type.
  template <class Body>
  static void with_data(const StateView& state, Body body) {
    if constexpr (sizeof(Scalar) == sizeof(double)) {
      body(static_cast<double*>(state.data));
    } else if (state.dtype == DType::bf16) {
      body(static_cast<bf16*>(state.data));
    } else {
      body(static_cast<float*>(state.data));
    }
  }

  void copy(const StateView& from, const StateView& to, int64_t width) {
    if (from.data == to.data) return;
    with_data(from, [&](auto* source) {
      with_data(to, [&](auto* target) {
        for (int64_t i = 0; i < inputs_.key_dim; ++i) {
          sweep<Vec>(width, [&](int64_t j, auto lanes) {
            Vec::store(target + i * to.stride + j, Vec::load(source + i * from.stride + j, lanes), lanes);
          });
        }
      });
    });
  }

  void load_token(const Task& task, int64_t batch, int64_t token) {
    const int64_t key_head = task.head / inputs_.group();
    load_key(inputs_.q, batch, token, key_head, q_);
    load_key(inputs_.k, batch, token, key_head, k_);
    with_element_type<Vec>(inputs_.v.dtype, [&](auto element) {
      const auto* from = static_cast<const typename decltype(element)::type*>(inputs_.v.data);
      load_row<Vec>(from + inputs_.v.offset(batch, token, task.head) + task.column, update_, task.width);
    });
    decay_ = exp_of<Vec>(load_gate<Vec>(inputs_.g, batch, token, task.head));
    beta_ = load_number<Vec>(inputs_.beta, batch, token, task.head);
  }

  void load_key(const TokenTensor& tensor, int64_t batch, int64_t token, int64_t key_head, Scalar* to) {
    with_element_type<Vec>(tensor.dtype, [&](auto element) {
      const auto* from = static_cast<const typename decltype(element)::type*>(tensor.data);
      load_row<Vec>(from + tensor.offset(batch, token, key_head), to, inputs_.key_dim);
    });
    if (inputs_.l2norm_qk) normalise<Vec>(to, inputs_.key_dim);
  }

  // v in update_ becomes u.
  void read(const StateView& state, int64_t width) {
    fill_zero(sums_, round_up(width, Vec::lanes));
    with_data(state, [&](const auto* data) {
      for (int64_t i = 0; i < inputs_.key_dim; i += kReadRows) {
        Vec keys[kReadRows];
        for (int64_t r = 0; r < kReadRows; ++r) keys[r] = Vec::set(k_[i + r]);
        const auto* rows = data + i * state.stride;
        sweep<Vec>(width, [&](int64_t j, auto lanes) {
          Vec sum = Vec::load(sums_ + j, Full{});
          for (int64_t r = 0; r < kReadRows; ++r) {
            sum = fma(keys[r], Vec::load(rows + r * state.stride + j, lanes), sum);
          }
          Vec::store(sums_ + j, sum, Full{});
        });
      }
    });
    const Vec decay = Vec::set(decay_), beta = Vec::set(beta_);
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      const Vec known = decay * Vec::load(sums_ + j, Full{});
      Vec::store(update_ + j, beta * (Vec::load(update_ + j, Full{}) - known), Full{});
    }
  }

  // o into sums_. `from` and `to` may be the same.
  void write(const StateView& from, const StateView& to, int64_t width) {
    const Vec decay = Vec::set(decay_), scale = Vec::set(static_cast<Scalar>(inputs_.scale));
    fill_zero(sums_, round_up(width, Vec::lanes));
    with_data(from, [&](const auto* source) {
      with_data(to, [&](auto* target) {
        for (int64_t i = 0; i < inputs_.key_dim; i += kWriteRows) {
          Vec keys[kWriteRows], queries[kWriteRows];
          for (int64_t r = 0; r < kWriteRows; ++r) {
            keys[r] = Vec::set(k_[i + r]);
            queries[r] = scale * Vec::set(q_[i + r]);
          }
          const auto* source_rows = source + i * from.stride;
          auto* target_rows = target + i * to.stride;
          sweep<Vec>(width, [&](int64_t j, auto lanes) {
            const Vec update = Vec::load(update_ + j, Full{});
            Vec sum = Vec::load(sums_ + j, Full{});
            for (int64_t r = 0; r < kWriteRows; ++r) {
              const Vec old = decay * Vec::load(source_rows + r * from.stride + j, lanes);
              const Vec state = fma(keys[r], update, old);
              Vec::store(target_rows + r * to.stride + j, state, lanes);
              sum = fma(queries[r], state, sum);
            }
            Vec::store(sums_ + j, sum, Full{});
          });
        }
      });
    });
  }

  const Inputs& inputs_;
  Matrix<Scalar> state_;  // [K, columns], between tokens
  Scalar* q_;
  Scalar* k_;
  Scalar* update_;
  Scalar* sums_;
  Scalar decay_ = 0;
  Scalar beta_ = 0;
};

}  // namespace
}  // namespace inlay::gdn
