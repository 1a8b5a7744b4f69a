// Forward of the experts, in two steps.
//
// `up`: for a tile of one expert's rows, and some features, the first projection, and the activations of it, which are
// stored by row. `combine`: for some tokens, and some features of the result, every expert's second projection of its
// rows among them, added up in the order of experts: no two threads write to the same result.
#pragma once

#include "moe/cpu/activation_impl.h"
#include "moe/cpu/products_impl.h"

namespace inlay::moe {
namespace {

// Where gates and values to be gated are among the first projection's features, for activations
// [feature, feature + count): `parts` runs of `width` from `first` on.
struct FeatureRuns {
  INLAY_INLINE FeatureRuns(const ExpertInputs& in, int64_t feature, int64_t count)
      : parts(in.gating.gated && !in.gating.interleaved ? 2 : 1),
        width(in.gating.gated && in.gating.interleaved ? 2 * count : count),
        first{parts == 1 ? (width > count ? 2 * feature : feature) : feature, in.intermediate + feature} {}

  int64_t parts;
  int64_t width;
  int64_t first[2];
};

template <class Vec>
class Up {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  static int64_t elements(const ExpertInputs& in) {
    using Arena = MatrixArena<Scalar>;
    const int64_t width = 2 * round_up(kUpFeatures, Vec::lanes) + 2 * Vec::lanes;
    return Arena::elements(in.hidden, kTileRows) + Arena::elements(width, kTileRows) + Arena::elements(1, width) +
           Arena::elements(kFewRows, in.hidden) + 2 * Arena::elements(kFewRows, width) +
           Arena::elements(1, tile_elements<Scalar>());
  }

  Up(const ExpertForwardParams& p, void* activations, void* memory) : Up(p, activations, MatrixArena<Scalar>(memory)) {}

  void run(const UpTask& task) {
    if (task.count <= kFewRows) {
      few(task);
    } else {
      tile(task);
    }
  }

 private:
  Up(const ExpertForwardParams& p, void* activations, MatrixArena<Scalar> arena)
      : p_(p),
        in_(p.inputs),
        activations_(activations),
        x_(arena.take(p.inputs.hidden, kTileRows)),
        h_(arena.take(2 * round_up(kUpFeatures, Vec::lanes) + 2 * Vec::lanes, kTileRows)),
        bias_(arena.take_row(2 * round_up(kUpFeatures, Vec::lanes) + 2 * Vec::lanes)),
        few_x_(arena.take(kFewRows, p.inputs.hidden)),
        few_h_(arena.take(kFewRows, 2 * round_up(kUpFeatures, Vec::lanes) + 2 * Vec::lanes)),
        few_gates_(arena.take(kFewRows, 2 * round_up(kUpFeatures, Vec::lanes) + 2 * Vec::lanes)),
        tile_(arena.take_row(tile_elements<Scalar>())) {}

  template <class E>
  const E* x_row(int64_t row) const {
    return static_cast<const E*>(in_.x.data) + p_.rows.slots[row] / in_.slots * in_.x.layout.outer_stride;
  }
  template <class E>
  E* h_row(int64_t row) const {
    return static_cast<E*>(p_.h.data) + row * in_.pre_activations();
  }
  template <class E>
  E* activation_row(int64_t row) const {
    return static_cast<E*>(activations_) + row * in_.intermediate;
  }

  void tile(const UpTask& task) {
    const int64_t rows = round_up(task.count, Vec::lanes);
    const FeatureRuns runs(in_, task.feature, task.features);
    const Weights weights = weights_of(in_.gate_up_proj, task.expert, in_.transposed);
    with_element_type<Vec>(in_.x.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      load_transposed<Vec>([&](int64_t r) { return x_row<E>(task.row + r); }, task.count, in_.hidden, x_);
      for (int64_t part = 0; part < runs.parts; ++part) {
        const int64_t first = runs.first[part];
        const M h = from_row(h_, part * task.features);
        multiply_tile<Vec>(weights.from_feature(first), runs.width, in_.hidden, x_, rows, h, tile_);
        if (in_.gate_up_bias.data) {
          load_bias<Vec>(in_.gate_up_bias, task.expert, first, runs.width, bias_);
          for (int64_t f = 0; f < runs.width; ++f) add(h.row(f), Vec::set(bias_[f]), rows);
        }
        if (p_.h.data) {
          store_transposed<Vec>(h, task.count, runs.width, [&](int64_t r) { return h_row<E>(task.row + r) + first; });
        }
      }
      const bool interleaved = in_.gating.gated && in_.gating.interleaved;
      for (int64_t f = 0; f < task.features; ++f) {
        const Scalar* gate = h_.row(interleaved ? 2 * f : f);
        const Scalar* up = h_.row(interleaved ? 2 * f + 1 : task.features + f);
        activate<Vec>(in_.gating, gate, in_.gating.gated ? up : gate, h_.row(f), rows);
      }
      store_transposed<Vec>(h_, task.count, task.features,
                            [&](int64_t r) { return activation_row<E>(task.row + r) + task.feature; });
    });
  }

  static void add(Scalar* row, Vec value, int64_t width) {
    for (int64_t j = 0; j < width; j += Vec::lanes) Vec::store(row + j, Vec::load(row + j, Full{}) + value, Full{});
  }

  void few(const UpTask& task) {
    const FeatureRuns runs(in_, task.feature, task.features);
    const Weights weights = weights_of(in_.gate_up_proj, task.expert, in_.transposed);
    const int64_t up_column = round_up(task.features, Vec::lanes);
    const bool interleaved = in_.gating.gated && in_.gating.interleaved;
    with_element_type<Vec>(in_.x.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      for (int64_t r = 0; r < task.count; ++r) load_row<Vec>(x_row<E>(task.row + r), few_x_.row(r), in_.hidden);
      for (int64_t r = task.count; r < kFewRows; ++r) fill_zero(few_x_.row(r), in_.hidden);
      for (int64_t part = 0; part < runs.parts; ++part) {
        const int64_t first = runs.first[part];
        const M h = from_column(few_h_, part * up_column);
        multiply_rows<Vec>(weights.from_feature(first), runs.width, in_.hidden, few_x_, task.count, h);
        load_bias<Vec>(in_.gate_up_bias, task.expert, first, runs.width, bias_);
        for (int64_t r = 0; r < task.count; ++r) {
          if (in_.gate_up_bias.data) {
            for (int64_t f = 0; f < runs.width; f += Vec::lanes) {
              Vec::store(h.row(r) + f, Vec::load(h.row(r) + f, Full{}) + Vec::load(bias_ + f, Full{}), Full{});
            }
          }
          if (p_.h.data) store_row<Vec>(h.row(r), h_row<E>(task.row + r) + first, runs.width);
        }
      }
      for (int64_t r = 0; r < task.count; ++r) {
        const Scalar* gate = few_h_.row(r);
        const Scalar* up = few_h_.row(r) + up_column;
        if (interleaved) {
          Scalar* apart = few_gates_.row(r);
          for (int64_t f = 0; f < task.features; ++f) apart[f] = few_h_.row(r)[2 * f];
          for (int64_t f = 0; f < task.features; ++f) apart[up_column + f] = few_h_.row(r)[2 * f + 1];
          for (int64_t f = task.features; f < up_column; ++f) apart[f] = apart[up_column + f] = 0;
          gate = apart;
          up = apart + up_column;
        }
        activate<Vec>(in_.gating, gate, in_.gating.gated ? up : gate, few_h_.row(r), up_column);
        store_row<Vec>(few_h_.row(r), activation_row<E>(task.row + r) + task.feature, task.features);
      }
    });
  }

  const ExpertForwardParams& p_;
  const ExpertInputs& in_;
  void* activations_;
  M x_;  // [H, rows]
  M h_;  // [features of the projection, rows], then activations
  Scalar* bias_;
  M few_x_;  // [rows, H]
  M few_h_;
  M few_gates_;
  Scalar* tile_;
};

template <class Vec>
class Combine {
 public:
  using Scalar = typename Vec::Scalar;
  using M = Matrix<Scalar>;

  static int64_t elements(int64_t depth) {
    using Arena = MatrixArena<Scalar>;
    return Arena::elements(kCombineTokens, kMostFeatures) + Arena::elements(depth, kTileRows) +
           Arena::elements(kMostFeatures, kTileRows) + Arena::elements(kTileRows, kMostFeatures) +
           Arena::elements(kFewRows, depth) + Arena::elements(2, kMostFeatures) +
           Arena::elements(1, tile_elements<Scalar>());
  }

  Combine(const Combination& p, void* memory) : Combine(p, MatrixArena<Scalar>(memory)) {}

  void run(const CombineTask& task) {
    const ExpertInputs& in = *p_.inputs;
    const int64_t width = round_up(task.features, Vec::lanes);
    for (int64_t t = task.token; t < task.end; ++t) fill_zero(sums_.row(t - task.token), width);
    for (int64_t expert = 0; expert < in.experts; ++expert) {
      const int64_t first = row_from(expert, task.token), last = row_from(expert, task.end);
      if (first == last) continue;
      load_bias<Vec>(p_.bias, expert, task.feature, task.features, bias_);
      const int64_t tiles = (last - first + kTileRows - 1) / kTileRows;
      for (int64_t tile = 0; tile < tiles; ++tile) {  // of about as many rows each
        const int64_t row = first + (last - first) * tile / tiles;
        add_rows(task, expert, row, first + (last - first) * (tile + 1) / tiles - row);
      }
    }
    store(task);
  }

  static constexpr int64_t kMostFeatures = 128;

 private:
  Combine(const Combination& p, MatrixArena<Scalar> arena)
      : p_(p),
        sums_(arena.take(kCombineTokens, kMostFeatures)),
        values_(arena.take(p.values.depth, kTileRows)),
        products_(arena.take(kMostFeatures, kTileRows)),
        results_(arena.take(kTileRows, kMostFeatures)),
        few_(arena.take(kFewRows, p.values.depth)),
        bias_(arena.take_row(kMostFeatures)),
        weights_(arena.take_row(kMostFeatures)),
        tile_(arena.take_row(tile_elements<Scalar>())) {}

  // The expert's first row of the token, or of the next one that it has.
  int64_t row_from(int64_t expert, int64_t token) const {
    int64_t low = first_row(p_.rows, expert), high = p_.rows.ends[expert];
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (p_.rows.slots[middle] / p_.inputs->slots < token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  void add_rows(const CombineTask& task, int64_t expert, int64_t row, int64_t count) {
    const ExpertInputs& in = *p_.inputs;
    const Weights matrix = weights_of(p_.matrices, expert, p_.depth_is_rows).from_feature(task.feature);
    const int64_t depth = p_.values.depth, width = round_up(task.features, Vec::lanes);
    with_element_type<Vec>(in.x.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      const E* values = static_cast<const E*>(p_.values.data) + row * depth;
      if (count <= kFewRows) {
        for (int64_t r = 0; r < count; ++r) load_row<Vec>(values + r * depth, few_.row(r), depth);
        for (int64_t r = count; r < kFewRows; ++r) fill_zero(few_.row(r), depth);
        multiply_rows<Vec>(matrix, task.features, depth, few_, count, results_);
      } else {
        load_transposed<Vec>([&](int64_t r) { return values + r * depth; }, count, depth, values_);
        multiply_tile<Vec>(matrix, task.features, depth, values_, round_up(count, Vec::lanes), products_, tile_);
        store_transposed<Vec>(products_, count, task.features, [&](int64_t r) { return results_.row(r); });
      }
    });
    load_weights<Vec>(p_.weights, p_.rows, row, count, weights_);
    for (int64_t r = 0; r < count; ++r) {
      Scalar* sums = sums_.row(p_.rows.slots[row + r] / in.slots - task.token);
      const Vec weight = Vec::set(weights_[r]);
      for (int64_t f = 0; f < width; f += Vec::lanes) {
        const Vec value = Vec::load(results_.row(r) + f, Full{}) + Vec::load(bias_ + f, Full{});
        Vec::store(sums + f, fma(weight, value, Vec::load(sums + f, Full{})), Full{});
      }
    }
  }

  void store(const CombineTask& task) {
    with_element_type<Vec>(p_.y.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      for (int64_t t = task.token; t < task.end; ++t) {
        const Scalar* sums = sums_.row(t - task.token);
        E* y = static_cast<E*>(p_.y.data) + t * p_.features + task.feature;
        if (!p_.shared.data) {
          store_row<Vec>(sums, y, task.features);
          continue;
        }
        const Vec gate = p_.shared_gate.data ? sigmoid(Vec::set(load_element<Vec>(p_.shared_gate, t))) : Vec::set(1);
        const E* shared = static_cast<const E*>(p_.shared.data) + p_.shared.layout.offset(t) + task.feature;
        sweep<Vec>(task.features, [&](int64_t f, auto lanes) {
          Vec::store(y + f, fma(gate, Vec::load(shared + f, lanes), Vec::load(sums + f, Full{})), lanes);
        });
      }
    });
  }

  const Combination& p_;
  M sums_;      // [tokens, features]
  M values_;    // [depth, rows]
  M products_;  // [features, rows]
  M results_;   // [rows, features]
  M few_;       // [rows, depth]
  Scalar* bias_;
  Scalar* weights_;
  Scalar* tile_;
};

}  // namespace
}  // namespace inlay::moe
