// What kernels do with weights before they meet rows, and the root that norms take.
#pragma once

#include "common/cpu/row_access.h"
#include "common/cpu/sweep.h"

namespace inlay::cpu {
namespace {

INLAY_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
INLAY_INLINE double square_root(double v) { return __builtin_sqrt(v); }

// vector + offset in full precision, or `absent` everywhere.
template <class Vec>
void widen(const VectorTensor& vector, int64_t width, double offset, double absent, typename Vec::Scalar* out) {
  using Scalar = typename Vec::Scalar;
  if (!vector.data) {
    for (int64_t i = 0; i < width; ++i) out[i] = static_cast<Scalar>(absent);
    return;
  }
  const RowReader<Vec, typename AnyFor<Scalar>::type> reader({vector.data, vector.dtype, {}}, 0);
  const Vec shift = Vec::set(static_cast<Scalar>(offset));
  // Adding an offset of zero would turn -0 into 0.
  sweep<Vec>(width, [&](int64_t i, auto lanes) {
    const Vec v = reader.load(i, lanes);
    Vec::store(out + i, offset == 0 ? v : v + shift, lanes);
  });
}

}  // namespace
}  // namespace inlay::cpu
