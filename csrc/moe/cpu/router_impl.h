// The router, a token at a time: scores, the choice of experts, their weights, and what losses and monitors want to
// know of all experts. The backward computes the scores again.
#pragma once

#include "common/cpu/partial_sums.h"
#include "common/cpu/row_access.h"
#include "common/cpu/token_rows.h"
#include "moe/cpu/kernels.h"

namespace inlay::moe {
namespace {

using namespace inlay::cpu;

INLAY_INLINE float log_of(float v) { return __builtin_logf(v); }
INLAY_INLINE double log_of(double v) { return __builtin_log(v); }

// What keeps a sum of sigmoids from being zero, as in the models that divide by it.
template <class Scalar>
constexpr Scalar kLeastSum = static_cast<Scalar>(1e-20);

// Before b in the order of choice, whose ties go to the lower index: NaN comes first, as in torch.topk.
template <class Scalar>
INLAY_INLINE bool precedes(Scalar a, Scalar b) {
  return a > b || (a != a && b == b);
}

template <class Vec>
class Router {
 public:
  using Scalar = typename Vec::Scalar;

  Router(const RouterInputs& inputs, void* memory) : in_(inputs), width_(round_up(inputs.experts, Vec::lanes)) {
    MatrixArena<Scalar> arena(memory);
    logits_ = arena.take_row(inputs.experts);
    scores_ = arena.take_row(inputs.experts);
    choosing_ = arena.take_row(inputs.experts);
    chosen_ = arena.take_row(inputs.experts);
    gradient_ = arena.take_row(inputs.experts);
  }

  static int64_t bytes(const RouterInputs& inputs) {
    return MatrixArena<Scalar>::elements(5, inputs.experts) * static_cast<int64_t>(sizeof(Scalar));
  }

  void forward(const RouterForwardParams& p, int64_t begin, int64_t end, int64_t* counts, Scalar* sums) {
    for (int64_t token = begin; token < end; ++token) {
      load(token);
      score();
      const int64_t* indices = p.forced.data ? forced(p, token) : choose(p, token);
      store_weights(p, token, indices);
      if (counts) add_statistics(p, token, indices, counts, sums);
    }
  }

  void backward(const RouterBackwardParams& p, int64_t begin, int64_t end) {
    Scalar tokens = 0;
    for (int64_t e = 0; p.dmean_probabilities.data && e < in_.experts; ++e) tokens += static_cast<Scalar>(p.counts[e]);
    const Scalar share = tokens > 0 ? static_cast<Scalar>(in_.slots) / tokens : 0;
    for (int64_t token = begin; token < end; ++token) {
      load(token);
      score();
      fill_zero(gradient_, width_);  // of the scores
      fill_zero(chosen_, width_);    // of the logits that were chosen, where the softmax is over those
      if (p.dweights.data) add_weights_gradient(p, token);
      const bool counted = !in_.mask || in_.mask[token];
      if (p.dmean_probabilities.data && counted) add_mean_gradient(p, share);
      finish_gradient(p, token);
    }
  }

 private:
  void load(int64_t token) {
    with_element_type<Vec>(in_.logits.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      load_row<Vec>(static_cast<const E*>(in_.logits.data) + in_.logits.layout.offset(token), logits_, in_.experts);
    });
  }

  // scores_: the softmax, or sigmoids; lse_ either way.
  void score() {
    const int64_t n = in_.experts;
    Scalar most = logits_[0];  // but for NaN, which the sum shows
    Vec largest = Vec::set(most);
    int64_t whole = 0;
    for (; whole + Vec::lanes <= n; whole += Vec::lanes) largest = max(Vec::load(logits_ + whole, Full{}), largest);
    Scalar lanes_of[Vec::lanes];
    Vec::store(lanes_of, largest, Full{});
    for (const Scalar lane : lanes_of) most = lane > most ? lane : most;
    for (; whole < n; ++whole) most = logits_[whole] > most ? logits_[whole] : most;
    const Vec shift = Vec::set(most);
    Vec total = Vec::set(0);
    sweep<Vec>(n, [&](int64_t e, auto lanes) {
      const Vec power = Vec::keep(exp(Vec::load(logits_ + e, Full{}) - shift), lanes);
      total = total + power;
      Vec::store(scores_ + e, power, Full{});
    });
    const Scalar sum_of_powers = sum(total);
    lse_ = most + log_of(sum_of_powers);
    if (in_.scoring == Scoring::sigmoid) {
      for (int64_t e = 0; e < n; e += Vec::lanes) {
        Vec::store(scores_ + e, sigmoid(Vec::load(logits_ + e, Full{})), Full{});
      }
      for (int64_t e = n; e < width_; ++e) scores_[e] = 0;
    } else {
      const Vec denominator = Vec::set(sum_of_powers);
      for (int64_t e = 0; e < n; e += Vec::lanes) {
        Vec::store(scores_ + e, Vec::load(scores_ + e, Full{}) / denominator, Full{});
      }
    }
  }

  const int64_t* forced(const RouterForwardParams& p, int64_t token) {
    int64_t* indices = p.indices + token * in_.slots;
    for (int64_t k = 0; k < in_.slots; ++k) indices[k] = p.forced[token * in_.slots + k];
    if (p.measures.data) choosing_scores(p);
    return indices;
  }

  void choosing_scores(const RouterForwardParams& p) {
    const Scalar* scores = in_.scoring == Scoring::softmax_of_chosen ? logits_ : scores_;
    for (int64_t e = 0; e < in_.experts; ++e) choosing_[e] = scores[e];
    if (!p.bias.data) return;
    with_element_type<Vec>(p.bias.dtype, [&](auto element) {
      const auto* bias = static_cast<const typename decltype(element)::type*>(p.bias.data);
      sweep<Vec>(in_.experts, [&](int64_t e, auto lanes) {
        Vec::store(choosing_ + e, Vec::load(choosing_ + e, lanes) + Vec::load(bias + e, lanes), lanes);
      });
    });
  }

  // The `count` first of values[0, size) in the order of choice.
  static void top(const Scalar* values, int64_t size, int64_t count, int64_t* best) {
    int64_t found = 0;
    Scalar last = 0;  // the value of the last of the best, once there are as many
    for (int64_t e = 0; e < size; ++e) {
      if (found == count && values[e] <= last) continue;
      if (found == count && !precedes(values[e], last)) continue;
      int64_t place = found < count ? found++ : count - 1;
      for (; place > 0 && precedes(values[e], values[best[place - 1]]); --place) best[place] = best[place - 1];
      best[place] = e;
      last = values[best[found - 1]];
    }
  }

  const int64_t* choose(const RouterForwardParams& p, int64_t token) {
    choosing_scores(p);
    if (p.chosen_groups < p.groups) exclude_groups(p);
    int64_t* indices = p.indices + token * in_.slots;
    top(choosing_, in_.experts, in_.slots, indices);
    return indices;
  }

  // Leaves the groups whose two highest scores have the largest sums.
  void exclude_groups(const RouterForwardParams& p) {
    const int64_t size = in_.experts / p.groups;
    Scalar* sums = chosen_;
    for (int64_t group = 0; group < p.groups; ++group) {
      int64_t best[2];
      top(choosing_ + group * size, size, 2, best);
      sums[group] = choosing_[group * size + best[0]] + choosing_[group * size + best[1]];
    }
    int64_t order[kMaxRoutedExperts / 2];
    top(sums, p.groups, p.chosen_groups, order);
    for (int64_t group = 0; group < p.groups; ++group) {
      bool kept = false;
      for (int64_t i = 0; i < p.chosen_groups; ++i) kept = kept || order[i] == group;
      for (int64_t e = group * size; !kept && e < (group + 1) * size; ++e) {
        choosing_[e] = -static_cast<Scalar>(__builtin_inf());
      }
    }
  }

  // weights[k] before the scaling: of the chosen scores, or the softmax of the chosen logits. Returns what the scores
  // were divided by.
  Scalar weights_of(const int64_t* indices, Scalar* weights) const {
    const int64_t slots = in_.slots;
    Scalar total = 0;
    if (in_.scoring == Scoring::softmax_of_chosen) {
      Scalar most = logits_[indices[0]];
      for (int64_t k = 1; k < slots; ++k) most = precedes(logits_[indices[k]], most) ? logits_[indices[k]] : most;
      for (int64_t k = 0; k < slots; ++k) total += weights[k] = exp_of<Vec>(logits_[indices[k]] - most);
    } else {
      for (int64_t k = 0; k < slots; ++k) total += weights[k] = scores_[indices[k]];
      if (!in_.renormalize) return 1;
      total += kLeastSum<Scalar>;
    }
    for (int64_t k = 0; k < slots; ++k) weights[k] /= total;
    return total;
  }

  void store_weights(const RouterForwardParams& p, int64_t token, const int64_t* indices) {
    Scalar weights[kMaxSlots] = {};
    weights_of(indices, weights);
    const Vec scaling = Vec::set(static_cast<Scalar>(in_.scaling));
    with_element_type<Vec>(p.weights.dtype, [&](auto element) {
      auto* out = static_cast<typename decltype(element)::type*>(p.weights.data) + token * in_.slots;
      sweep<Vec>(in_.slots,
                 [&](int64_t k, auto lanes) { Vec::store(out + k, Vec::load(weights + k, Full{}) * scaling, lanes); });
    });
  }

  void add_statistics(const RouterForwardParams& p, int64_t token, const int64_t* indices, int64_t* counts,
                      Scalar* sums) {
    const int64_t n = in_.experts;
    Scalar total = 1, entropy = 0, largest = 0, least = 0, other = 0;
    if (in_.scoring == Scoring::sigmoid) {
      total = kLeastSum<Scalar>;
      for (int64_t e = 0; e < n; ++e) total += scores_[e];
      entropy = log_of(total) * ((total - kLeastSum<Scalar>) / total);  // all scores zero: so are the probabilities
    }
    // -log of a score: the softplus of -logit, or lse - logit. A score of zero adds nothing, whatever its logarithm.
    Vec surprise = Vec::set(0);
    const Vec lse = Vec::set(lse_), lowest = Vec::set(static_cast<Scalar>(-1e30));
    sweep<Vec>(n, [&](int64_t e, auto lanes) {
      const Vec logit = max(lowest, Vec::load(logits_ + e, Full{}));
      const Vec negative_log = in_.scoring == Scoring::sigmoid ? softplus(-logit) : lse - logit;
      surprise = surprise + Vec::keep(Vec::load(scores_ + e, Full{}) * negative_log, lanes);
    });
    entropy += sum(surprise) / total;
    for (int64_t e = 0; e < n; ++e) {
      const Scalar size = logits_[e] < 0 ? -logits_[e] : logits_[e];
      if (precedes(size, largest)) largest = size;
    }
    least = choosing_[indices[0]];
    for (int64_t k = 0; k < in_.slots; ++k) least = choosing_[indices[k]] < least ? choosing_[indices[k]] : least;
    other = -static_cast<Scalar>(__builtin_inf());
    for (int64_t e = 0; e < n; ++e) {
      bool is_chosen = false;
      for (int64_t k = 0; k < in_.slots; ++k) is_chosen = is_chosen || indices[k] == e;
      if (!is_chosen && choosing_[e] > other) other = choosing_[e];
    }
    auto* measures = static_cast<Scalar*>(p.measures.data) + token;
    measures[0] = entropy;
    measures[in_.tokens] = least - other;
    measures[2 * in_.tokens] = largest;
    static_cast<Scalar*>(p.logsumexp.data)[token] = lse_;
    if (in_.mask && !in_.mask[token]) return;
    for (int64_t k = 0; k < in_.slots; ++k) ++counts[indices[k]];
    for (int64_t e = 0; e < n; ++e) sums[e] += scores_[e] / total;
  }

  void add_weights_gradient(const RouterBackwardParams& p, int64_t token) {
    const int64_t* indices = p.indices + token * in_.slots;
    Scalar weights[kMaxSlots], dweights[kMaxSlots];
    const Scalar total = weights_of(indices, weights);
    with_element_type<Vec>(p.dweights.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      const E* row = static_cast<const E*>(p.dweights.data) + p.dweights.layout.offset(token);
      for (int64_t k = 0; k < in_.slots; ++k) {
        Scalar lanes[Vec::lanes];
        Vec::store(lanes, Vec::load(row + k, Partial{1}), Full{});
        dweights[k] = lanes[0] * static_cast<Scalar>(in_.scaling);
      }
    });
    Scalar mean = 0;
    const bool of_chosen = in_.scoring == Scoring::softmax_of_chosen;
    if (of_chosen || in_.renormalize) {
      for (int64_t k = 0; k < in_.slots; ++k) mean += weights[k] * dweights[k];
    }
    for (int64_t k = 0; k < in_.slots; ++k) {
      if (of_chosen) {
        chosen_[indices[k]] += weights[k] * (dweights[k] - mean);
      } else {
        gradient_[indices[k]] += (dweights[k] - mean) / total;
      }
    }
  }

  void add_mean_gradient(const RouterBackwardParams& p, Scalar share) {
    const auto* dmean = static_cast<const Scalar*>(p.dmean_probabilities.data);
    if (in_.scoring != Scoring::sigmoid) {
      for (int64_t e = 0; e < in_.experts; ++e) gradient_[e] += dmean[e] * share;
      return;
    }
    Scalar total = kLeastSum<Scalar>, mean = 0;
    for (int64_t e = 0; e < in_.experts; ++e) total += scores_[e];
    for (int64_t e = 0; e < in_.experts; ++e) mean += scores_[e] / total * dmean[e];
    for (int64_t e = 0; e < in_.experts; ++e) gradient_[e] += (dmean[e] - mean) / total * share;
  }

  // From the gradient of the scores to that of the logits.
  void finish_gradient(const RouterBackwardParams& p, int64_t token) {
    const Scalar dlse = p.dlogsumexp.data ? static_cast<const Scalar*>(p.dlogsumexp.data)[token] : 0;
    const Vec one = Vec::set(1), from_lse = Vec::set(dlse), lse = Vec::set(lse_);
    const bool is_sigmoid = in_.scoring == Scoring::sigmoid;
    const Vec mean = Vec::set(is_sigmoid ? 0 : dot<Vec>(scores_, gradient_, width_));
    with_element_type<Vec>(p.dlogits.dtype, [&](auto element) {
      auto* row = static_cast<typename decltype(element)::type*>(p.dlogits.data) + token * in_.experts;
      sweep<Vec>(in_.experts, [&](int64_t e, auto lanes) {
        const Vec score = Vec::load(scores_ + e, Full{}), gradient = Vec::load(gradient_ + e, Full{});
        Vec result = Vec::load(chosen_ + e, Full{});
        if (is_sigmoid) {
          result = result + gradient * (score * (one - score));
          if (dlse != 0) result = result + from_lse * exp(Vec::load(logits_ + e, Full{}) - lse);
        } else {
          result = result + score * ((gradient - mean) + from_lse);
        }
        Vec::store(row + e, result, lanes);
      });
    });
  }

  const RouterInputs& in_;
  int64_t width_;  // of a row, in whole vectors
  Scalar* logits_;
  Scalar* scores_;
  Scalar* choosing_;  // what experts are chosen by
  Scalar* chosen_;
  Scalar* gradient_;
  Scalar lse_ = 0;
};

template <class Vec>
void route(const RouterForwardParams& p, int64_t begin, int64_t end, int64_t* counts, void* sums, void* memory) {
  Router<Vec>(p.inputs, memory).forward(p, begin, end, counts, static_cast<typename Vec::Scalar*>(sums));
}

template <class Vec>
void route_backward(const RouterBackwardParams& p, int64_t begin, int64_t end, void* memory) {
  Router<Vec>(p.inputs, memory).backward(p, begin, end);
}

template <class Vec>
void mean_of_groups(const void* sums, int64_t groups, int64_t experts, int64_t tokens, const OutputTensor& mean) {
  using Scalar = typename Vec::Scalar;
  auto* out = static_cast<Scalar*>(mean.data);
  for (int64_t begin = 0; begin < experts; begin += kSumBlock) {
    const int64_t count = smaller(kSumBlock, experts - begin);
    Scalar totals[kSumBlock];
    add_groups(static_cast<const Scalar*>(sums) + begin, groups, experts, count, totals);
    for (int64_t i = 0; i < count; ++i) out[begin + i] = totals[i] / static_cast<Scalar>(tokens > 0 ? tokens : 1);
  }
}

template <class Vec>
int64_t router_bytes(const RouterInputs& inputs) {
  return Router<Vec>::bytes(inputs);
}

}  // namespace
}  // namespace inlay::moe
