// The decay and the step size of each token and head, and their gradients, over a vector type:
//
//   g = -exp(A_log) softplus(a + dt_bias)       beta = beta_scale sigmoid(b)
#pragma once

#include "common/cpu/row_access.h"
#include "gdn/cpu/rows_impl.h"

namespace inlay::gdn {
namespace {

template <class Vec>
using GateReader = RowReader<Vec, typename AnyFor<typename Vec::Scalar>::type>;
template <class Vec>
using GateWriter = RowWriter<Vec, typename AnyFor<typename Vec::Scalar>::type>;

template <class Vec>
INLAY_INLINE GateReader<Vec> vector_reader(const VectorTensor& vector) {
  return GateReader<Vec>({vector.data, vector.dtype, {}}, 0);
}

template <class Vec>
void gates(const GatesParams& p, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  const GateReader<Vec> log_decay = vector_reader<Vec>(p.log_decay), dt_bias = vector_reader<Vec>(p.dt_bias);
  const Vec beta_scale = Vec::set(static_cast<Scalar>(p.beta_scale));
  for (int64_t row = begin; row < end; ++row) {
    const GateReader<Vec> a(p.a, row), b(p.b, row);
    const GateWriter<Vec> g(p.g, row, p.heads, false), beta(p.beta, row, p.heads, false);
    sweep<Vec>(p.heads, [&](int64_t j, auto lanes) {
      const Vec rate = -exp(log_decay.load(j, lanes));
      g.store(j, rate * softplus(a.load(j, lanes) + dt_bias.load(j, lanes)), lanes);
      beta.store(j, beta_scale * sigmoid(b.load(j, lanes)), lanes);
    });
  }
}

// Row [begin, end) of the gradients, whose sums are added to `dlog_decay` and `ddt_bias` unless null.
template <class Vec>
void gate_rows_backward(const GatesBackwardParams& p, int64_t begin, int64_t end, typename Vec::Scalar* dlog_decay,
                        typename Vec::Scalar* ddt_bias) {
  using Scalar = typename Vec::Scalar;
  const GateReader<Vec> log_decay = vector_reader<Vec>(p.log_decay), dt_bias = vector_reader<Vec>(p.dt_bias);
  const Vec one = Vec::set(1), beta_scale = Vec::set(static_cast<Scalar>(p.beta_scale));
  for (int64_t row = begin; row < end; ++row) {
    const GateReader<Vec> dg(p.dg, row), dbeta(p.dbeta, row), a(p.a, row), b(p.b, row);
    const GateWriter<Vec> da(p.da, row, p.heads, false), db(p.db, row, p.heads, false);
    sweep<Vec>(p.heads, [&](int64_t j, auto lanes) {
      const Vec step = a.load(j, lanes) + dt_bias.load(j, lanes);
      const Vec upstream = dg.load(j, lanes) * -exp(log_decay.load(j, lanes));
      const Vec dstep = upstream * sigmoid(step);
      da.store(j, dstep, lanes);
      if (dlog_decay) {
        Vec::store(dlog_decay + j, fma(upstream, softplus(step), Vec::load(dlog_decay + j, lanes)), lanes);
        Vec::store(ddt_bias + j, dstep + Vec::load(ddt_bias + j, lanes), lanes);
      }
      const Vec opening = sigmoid(b.load(j, lanes));
      db.store(j, dbeta.load(j, lanes) * beta_scale * opening * (one - opening), lanes);
    });
  }
}

template <class Vec>
void gates_backward(const GatesBackwardParams& p, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  if (!p.partials) return gate_rows_backward<Vec>(p, begin, end, nullptr, nullptr);
  for (int64_t group = begin; group < end; ++group) {
    Scalar* sums = static_cast<Scalar*>(p.partials) + group * 2 * p.heads;
    fill_zero(sums, 2 * p.heads);
    const int64_t first = p.rows / p.partial_rows * group + smaller(group, p.rows % p.partial_rows);
    const int64_t last = p.rows / p.partial_rows * (group + 1) + smaller(group + 1, p.rows % p.partial_rows);
    gate_rows_backward<Vec>(p, first, last, sums, sums + p.heads);
  }
}

template <class Vec>
void sum_gate_partials(const GatesBackwardParams& p) {
  using Scalar = typename Vec::Scalar;
  const Scalar* partial = static_cast<const Scalar*>(p.partials);
  const OutputTensor* outputs[] = {&p.dlog_decay, &p.ddt_bias};
  for (const OutputTensor* output : outputs) {
    const GateWriter<Vec> writer(*output, 0, p.heads, false);
    sweep<Vec>(p.heads, [&](int64_t j, auto lanes) {
      Vec total = Vec::set(0);
      for (int64_t group = 0; group < p.partial_rows; ++group) {
        total = total + Vec::load(partial + group * 2 * p.heads + j, lanes);
      }
      writer.store(j, total, lanes);
    });
    partial += p.heads;
  }
}

}  // namespace
}  // namespace inlay::gdn
