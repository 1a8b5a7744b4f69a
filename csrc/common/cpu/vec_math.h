// Functions over any vector type of vec_*.h.
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

// e^r - 1 for |r| <= ln(2) / 2: the Taylor series, whose next term is 5e-9.
template <class Vec>
INLAY_INLINE Vec exp_less_one_near_zero(Vec r) {
  const auto constant = [](float value) { return Vec::set(value); };
  // Pairs of terms side by side: a chain of six would be all latency.
  const Vec r2 = r * r;
  const Vec terms23 = fma(r, constant(1.0f / 6), constant(0.5f));
  const Vec terms45 = fma(r, constant(1.0f / 120), constant(1.0f / 24));
  const Vec terms67 = fma(r, constant(1.0f / 5040), constant(1.0f / 720));
  const Vec series = fma(fma(terms67, r2, terms45), r2, terms23);
  return fma(series, r2, r);
}

// e^v in single precision, within one unit in the last place; NaN, infinities and subnormal results come out right.
// With n = round(v / ln 2): e^v = 2^n e^r, |r| <= ln(2) / 2, and e^r is its Taylor series (the next term is 5e-9).
template <class Vec>
INLAY_INLINE Vec exp(Vec v) {
  const auto constant = [](float value) { return Vec::set(value); };
  // Beyond these limits the result is 0 or infinity anyway, and scale() needs |n| bounded. NaN passes: it is the
  // second operand.
  v = min(constant(89.0f), max(constant(-104.0f), v));
  const Vec n = round_even(v * constant(0x1.715476p+0f));
  // ln 2 in two parts; the first has so few bits that n times it is exact.
  Vec r = fma(n, constant(-0x1.62e4p-1f), v);
  r = fma(n, constant(-0x1.7f7d1cp-20f), r);
  return scale(exp_less_one_near_zero(r) + constant(1.0f), n);
}

// e^v for v <= 0, a third cheaper: what would be below the normal numbers is zero. As above otherwise.
template <class Vec>
INLAY_INLINE Vec exp_of_nonpositive(Vec v) {
  const auto constant = [](float value) { return Vec::set(value); };
  v = max(constant(-88.0f), v);
  const Vec n = round_even(v * constant(0x1.715476p+0f));
  Vec r = fma(n, constant(-0x1.62e4p-1f), v);
  r = fma(n, constant(-0x1.7f7d1cp-20f), r);
  return scale_or_zero(exp_less_one_near_zero(r) + constant(1.0f), n);
}

// log(1 + v) in single precision for 0 <= v <= 1, small v to the last digits too; NaN stays NaN.
// With s = v / (2 + v) <= 1/3: log(1 + v) = 2 artanh(s), whose series' next term is 5e-10 of it.
template <class Vec>
INLAY_INLINE Vec log1p(Vec v) {
  const Vec s = v / (Vec::set(2) + v);
  const Vec s2 = s * s;
  Vec series = Vec::set(1.0f / 17);
  for (int odd = 15; odd >= 3; odd -= 2) series = fma(series, s2, Vec::set(1.0f / static_cast<float>(odd)));
  const Vec twice = s + s;
  return fma(twice * s2, series, twice);
}

// log(1 + e^v): v itself where e^-v is too small to matter.
template <class Vec>
INLAY_INLINE Vec softplus(Vec v) {
  return max(Vec::set(0), v) + log1p(exp(min(-v, v)));
}

// With e^2v - 1 = 2^n (e^r - 1) + (2^n - 1), which has its last digits for small v too, as `exp` less one has not.
template <class Vec>
INLAY_INLINE Vec tanh(Vec v) {
  const auto constant = [](float value) { return Vec::set(value); };
  // Beyond these limits the result is -1 or 1. NaN passes: it is the second operand.
  v = min(constant(20.0f), max(constant(-20.0f), v));
  v = v + v;
  const Vec n = round_even(v * constant(0x1.715476p+0f));
  Vec r = fma(n, constant(-0x1.62e4p-1f), v);
  r = fma(n, constant(-0x1.7f7d1cp-20f), r);
  const Vec less_one = scale(exp_less_one_near_zero(r), n) + (scale(constant(1.0f), n) - constant(1.0f));
  return less_one / (less_one + constant(2.0f));
}

template <class Vec>
INLAY_INLINE Vec sigmoid(Vec v) {
  const Vec one = Vec::set(1);
  return one / (one + exp(-v));
}

}  // namespace
}  // namespace inlay::cpu
