// Functions over any vector type of vec_*.h.
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

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
  Vec series = constant(1.0f / 5040);
  series = fma(series, r, constant(1.0f / 720));
  series = fma(series, r, constant(1.0f / 120));
  series = fma(series, r, constant(1.0f / 24));
  series = fma(series, r, constant(1.0f / 6));
  series = fma(series, r, constant(0.5f));
  return scale(fma(series, r * r, r) + constant(1.0f), n);
}

template <class Vec>
INLAY_INLINE Vec sigmoid(Vec v) {
  const Vec one = Vec::set(1);
  return one / (one + exp(-v));
}

}  // namespace
}  // namespace inlay::cpu
