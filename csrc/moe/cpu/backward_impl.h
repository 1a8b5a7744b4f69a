// Backward of the experts. With u a token's gradient, s a row's weight, and a its activations of h, for each row
//
//   da' = down_proj^T u;   ds = <da', a> + <u, down_bias>;   dh = the activation's gradient of s da'
//
// (`activation_gradient`), so that what experts gave is needed nowhere. Then dx is a combination like the forward's, of
// dh and the first matrices, and the gradients of the matrices are sums over their rows of outer products: dh with x,
// and s u with a. Each is a sum in the order of rows, kept by one thread.
#pragma once

#include "moe/cpu/forward_impl.h"

namespace inlay::moe {
namespace {

template <class Vec>
class ActivationGradient {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  static int64_t elements(const ExpertInputs& in) {
    using Arena = MatrixArena<Scalar>;
    return Arena::elements(in.hidden, kTileRows) + 3 * Arena::elements(kUpFeatures, kTileRows) +
           Arena::elements(1, in.hidden) + 2 * Arena::elements(1, kTileRows) +
           Arena::elements(1, tile_elements<Scalar>());
  }

  ActivationGradient(const ExpertBackwardParams& p, const BackwardScratch& scratch, void* memory)
      : ActivationGradient(p, scratch, MatrixArena<Scalar>(memory)) {}

  void run(const UpTask& task) {
    const int64_t rows = round_up(task.count, Vec::lanes);
    const FeatureRuns runs(in_, task.feature, task.features);
    const bool gated = in_.gating.gated, interleaved = gated && in_.gating.interleaved;
    const Weights down = weights_of(in_.down_proj, task.expert, !in_.transposed).from_feature(task.feature);
    with_element_type<Vec>(in_.x.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      const E* dy = static_cast<const E*>(p_.dy.data);
      load_transposed<Vec>(
          [&](int64_t r) { return dy + p_.rows.slots[task.row + r] / in_.slots * p_.dy.layout.outer_stride; },
          task.count, in_.hidden, dy_);
      multiply_tile<Vec>(down, task.features, in_.hidden, dy_, rows, da_, tile_);
      const auto* h = static_cast<const E*>(p_.h.data);
      const int64_t width = in_.pre_activations();
      for (int64_t part = 0; part < runs.parts; ++part) {
        load_transposed<Vec>([&](int64_t r) { return h + (task.row + r) * width + runs.first[part]; }, task.count,
                             runs.width, from_row(h_, part * task.features));
      }
      load_weights<Vec>(in_.weights, p_.rows, task.row, task.count, weights_);
      start_sums(task, rows);
      for (int64_t f = 0; f < task.features; ++f) {
        Scalar* gate = h_.row(interleaved ? 2 * f : f);
        Scalar* up = gated ? h_.row(interleaved ? 2 * f + 1 : task.features + f) : gate;
        row(gate, up, da_.row(f), rows);
      }
      if (p_.dweights.data) {
        auto* parts = static_cast<Scalar*>(scratch_.weights) + task.feature / kUpFeatures * in_.most_rows() + task.row;
        for (int64_t r = 0; r < task.count; ++r) parts[r] = sums_[r];
      }
      auto* dh = static_cast<E*>(scratch_.dh);
      for (int64_t part = 0; part < runs.parts; ++part) {
        store_transposed<Vec>(from_row(h_, part * task.features), task.count, runs.width,
                              [&](int64_t r) { return dh + (task.row + r) * width + runs.first[part]; });
      }
      if (!scratch_.a) return;
      auto* a = static_cast<E*>(scratch_.a);
      store_transposed<Vec>(da_, task.count, task.features,
                            [&](int64_t r) { return a + (task.row + r) * in_.intermediate + task.feature; });
    });
  }

 private:
  ActivationGradient(const ExpertBackwardParams& p, const BackwardScratch& scratch, MatrixArena<Scalar> arena)
      : p_(p),
        in_(p.inputs),
        scratch_(scratch),
        dy_(arena.take(p.inputs.hidden, kTileRows)),
        da_(arena.take(kUpFeatures, kTileRows)),
        h_(arena.take(2 * kUpFeatures, kTileRows)),
        bias_(arena.take_row(p.inputs.hidden)),
        weights_(arena.take_row(kTileRows)),
        sums_(arena.take_row(kTileRows)),
        tile_(arena.take_row(tile_elements<Scalar>())) {}

  // <u, down_bias>, which the block of the first activations adds.
  void start_sums(const UpTask& task, int64_t rows) {
    fill_zero(sums_, rows);
    if (!p_.dweights.data || !in_.down_bias.data || task.feature > 0) return;
    load_bias<Vec>(in_.down_bias, task.expert, 0, in_.hidden, bias_);
    for (int64_t i = 0; i < in_.hidden; ++i) {
      const Vec bias = Vec::set(bias_[i]);
      for (int64_t r = 0; r < rows; r += Vec::lanes) {
        Vec::store(sums_ + r, fma(bias, Vec::load(dy_.row(i) + r, Full{}), Vec::load(sums_ + r, Full{})), Full{});
      }
    }
  }

  // One activation of all rows. da becomes the activation itself, gate and up their gradients.
  void row(Scalar* gate, Scalar* up, Scalar* da, int64_t rows) {
    Scalar unweighted[kTileRows];
    for (int64_t r = 0; r < rows; r += Vec::lanes) {
      const Vec value = Vec::load(da + r, Full{});
      Vec::store(unweighted + r, value, Full{});
      Vec::store(da + r, value * Vec::load(weights_ + r, Full{}), Full{});
    }
    activate_backward<Vec>(in_.gating, gate, up, da, rows);
    for (int64_t r = 0; r < rows; r += Vec::lanes) {
      const Vec product =
          fma(Vec::load(unweighted + r, Full{}), Vec::load(da + r, Full{}), Vec::load(sums_ + r, Full{}));
      Vec::store(sums_ + r, product, Full{});
    }
  }

  const ExpertBackwardParams& p_;
  const ExpertInputs& in_;
  const BackwardScratch& scratch_;
  M dy_;  // [H, rows]
  M da_;  // [features, rows]
  M h_;   // [features of the projection, rows]
  Scalar* bias_;
  Scalar* weights_;
  Scalar* sums_;
  Scalar* tile_;
};

// Values of one row of a source, widened, from `first` on.
template <class Vec, class Scalar = typename Vec::Scalar>
void load_source(const ExpertInputs& in, const Rows& rows, const RowSource& source, int64_t row, int64_t first,
                 int64_t width, Scalar* to) {
  with_element_type<Vec>(in.x.dtype, [&](auto element) {
    using E = typename decltype(element)::type;
    const int64_t index = source.of_token ? rows.slots[row] / in.slots : row;
    const E* from = static_cast<const E*>(source.data) + index * source.stride + first;
    if (!source.weighted || !in.weights.data) return load_row<Vec>(from, to, width);
    const Vec weight = Vec::set(load_element<Vec>(in.weights, rows.slots[row]));
    sweep<Vec>(width, [&](int64_t j, auto lanes) { Vec::store(to + j, Vec::load(from + j, lanes) * weight, Full{}); });
  });
}

template <class Vec>
class Outer {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  static int64_t elements() {
    using Arena = MatrixArena<Scalar>;
    return Arena::elements(kTileRows, kTileFeatures) + Arena::elements(kTileRows, kOuterColumns) +
           Arena::elements(kTileFeatures, kOuterColumns);
  }

  Outer(const OuterProducts& p, void* memory) : Outer(p, MatrixArena<Scalar>(memory)) {}

  void run(const OuterTask& task) {
    const ExpertInputs& in = *p_.inputs;
    const int64_t width = round_up(task.columns, Vec::lanes);
    const int64_t first = first_row(p_.rows, task.expert), last = p_.rows.ends[task.expert];
    if (first == last) {
      for (int64_t i = 0; i < task.rows; ++i) fill_zero(sums_.row(i), width);
    }
    for (int64_t row = first; row < last; row += kTileRows) {
      const int64_t count = smaller(kTileRows, last - row);
      for (int64_t r = 0; r < count; ++r) {
        load_source<Vec>(in, p_.rows, p_.left, row + r, task.row, task.rows, left_.row(r));
        load_source<Vec>(in, p_.rows, p_.right, row + r, task.column, task.columns, right_.row(r));
      }
      GemmOperands<Scalar> product{task.rows, width, count, left_, right_, sums_};
      product.c_factor = row > first ? 1 : 0;
      multiply_transposed<Vec>(product);
    }
    with_element_type<Vec>(p_.out.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      E* out = static_cast<E*>(p_.out.data) + (task.expert * p_.height + task.row) * p_.width + task.column;
      for (int64_t i = 0; i < task.rows; ++i) store_row<Vec>(sums_.row(i), out + i * p_.width, task.columns);
    });
  }

 private:
  Outer(const OuterProducts& p, MatrixArena<Scalar> arena)
      : p_(p),
        left_(arena.take(kTileRows, kTileFeatures)),
        right_(arena.take(kTileRows, kOuterColumns)),
        sums_(arena.take(kTileFeatures, kOuterColumns)) {}

  const OuterProducts& p_;
  M left_;   // [rows, features]
  M right_;  // [rows, columns]
  M sums_;
};

template <class Vec>
void sum_rows(const ExpertInputs& in, const Rows& rows, const RowSource& source, int64_t expert, int64_t width,
              const OutputTensor& out, void* memory) {
  using Scalar = typename Vec::Scalar;
  MatrixArena<Scalar> arena(memory);
  Scalar* sums = arena.take_row(width);
  Scalar* values = arena.take_row(width);
  fill_zero(sums, round_up(width, Vec::lanes));
  for (int64_t row = first_row(rows, expert); row < rows.ends[expert]; ++row) {
    load_source<Vec>(in, rows, source, row, 0, width, values);
    for (int64_t j = 0; j < width; j += Vec::lanes) {
      Vec::store(sums + j, Vec::load(sums + j, Full{}) + Vec::load(values + j, Full{}), Full{});
    }
  }
  with_element_type<Vec>(out.dtype, [&](auto element) {
    store_row<Vec>(sums, static_cast<typename decltype(element)::type*>(out.data) + expert * width, width);
  });
}

// The gradients of the weights of rows [begin, end): sums over blocks of activations.
template <class Vec>
void weight_gradients(const ExpertBackwardParams& p, const BackwardScratch& scratch, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  const int64_t blocks = (p.inputs.intermediate + kUpFeatures - 1) / kUpFeatures;
  const auto* parts = static_cast<const Scalar*>(scratch.weights);
  for (int64_t row = begin; row < end; ++row) {
    Scalar total = 0;
    for (int64_t block = 0; block < blocks; ++block) total += parts[block * p.inputs.most_rows() + row];
    store_number<Vec>(total, p.dweights, p.rows.slots[row]);
  }
}

// The gradients of tokens [begin, end) of what is shared, and of its gate.
template <class Vec>
void shared_gradients(const ExpertBackwardParams& p, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  const ExpertInputs& in = p.inputs;
  with_element_type<Vec>(in.x.dtype, [&](auto element) {
    using E = typename decltype(element)::type;
    for (int64_t t = begin; t < end; ++t) {
      const E* dy = static_cast<const E*>(p.dy.data) + p.dy.layout.offset(t);
      const Vec gate = in.shared_gate.data ? sigmoid(Vec::set(load_element<Vec>(in.shared_gate, t))) : Vec::set(1);
      if (p.dshared.data) {
        E* dshared = static_cast<E*>(p.dshared.data) + t * in.hidden;
        sweep<Vec>(in.hidden,
                   [&](int64_t j, auto lanes) { Vec::store(dshared + j, gate * Vec::load(dy + j, lanes), lanes); });
      }
      if (!p.dshared_gate.data) continue;
      const E* shared = static_cast<const E*>(in.shared.data) + in.shared.layout.offset(t);
      Accumulator<Vec> product;
      sweep_sums<Vec>(
          in.hidden,
          [&](int64_t j, auto lanes, int part) {
            product.add_product(Vec::load(dy + j, lanes), Vec::load(shared + j, lanes), part);
          },
          product);
      Scalar slope[Vec::lanes];
      Vec::store(slope, gate * (Vec::set(1) - gate), Full{});
      store_number<Vec>(product.total() * slope[0], p.dshared_gate, t);
    }
  });
}

}  // namespace
}  // namespace inlay::moe
