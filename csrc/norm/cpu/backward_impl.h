// Backward of the norm family over a vector type. Per row, with c = x - mean, n = c * rstd and g = dy * weight:
//
//   dx = rstd * (g - n * sum(g * n) / N - sum(g) / N)      sum(g) for LayerNorm only; no 1 / N for l2
//   dweight += dy * n,  dbias += dy
//
// The first sweep takes the sums, the second one, from the cache, makes dx. A gate behind the norm scales dy before all
// this, a gate before the norm scales dx after it.
#pragma once

#include "common/cpu/partial_sums.h"
#include "norm/cpu/common_impl.h"

namespace inlay::norm {
namespace {

template <class Scalar>
struct BackwardScratch {
  Scalar* weight;  // with its offset; 1 where there is none
  Scalar* bias;    // for a gate behind the norm; 0 where there is none
  Scalar* sigmoid;
};

template <class Vec, class T, Form form>
void backward_rows(const BackwardParams& p, int64_t begin, int64_t end, BackwardScratch<typename Vec::Scalar> scratch,
                   typename Vec::Scalar* dweight, typename Vec::Scalar* dbias, bool stream) {
  using Scalar = typename Vec::Scalar;
  constexpr bool gated = form == Form::gate_before || form == Form::gate_after;
  const int64_t width = p.width;
  const Scalar share = p.kind == Kind::l2 ? Scalar(1) : 1 / static_cast<Scalar>(width);

  for (int64_t row = begin; row < end; ++row) {
    const RowReader<Vec, T> dy(p.dy, row);
    const RowReader<Vec, T> dresidual_out(p.dresidual_out, row);
    const RowReader<Vec, T> x(p.x, row);
    const RowReader<Vec, T> gate(p.gate, row);
    const int64_t next = row + 1 < end ? row + 1 : row;
    const RowReader<Vec, T> next_dy(p.dy, next);
    const RowReader<Vec, T> next_x(p.x, next);
    const RowReader<Vec, T> next_gate(p.gate, next);
    const RowWriter<Vec, T> dx(p.dx, row, width, stream);
    const RowWriter<Vec, T> dresidual(p.dresidual, row, width, stream);
    const RowWriter<Vec, T> dgate(p.dgate, row, width, stream);
    const Scalar rstd = static_cast<const Scalar*>(p.rstd)[row];
    const Vec factor = Vec::set(rstd);
    const Vec centre = Vec::set(p.mean ? static_cast<const Scalar*>(p.mean)[row] : Scalar(0));

    Accumulator<Vec> dot;    // of g and n
    Accumulator<Vec> total;  // of g
    const auto take_sums = [&](int64_t i, auto lanes, int part) {
      if constexpr (form == Form::add) dresidual_out.prefetch(i);
      const Vec weight = Vec::load(scratch.weight + i, lanes);
      Vec upstream = dy.load(i, lanes);
      Vec v = x.load(i, lanes);
      Vec z, sigmoid_z;
      if constexpr (gated) {
        z = gate.load(i, lanes);
        sigmoid_z = sigmoid(z);
        Vec::store(scratch.sigmoid + i, sigmoid_z, lanes);
      }
      if constexpr (form == Form::gate_before) v = v * activate(p.activation, z, sigmoid_z);
      const Vec n = (v - centre) * factor;
      if constexpr (form == Form::gate_after) {
        const Vec ungated = fma(n, weight, Vec::load(scratch.bias + i, lanes));
        dgate.store(i, upstream * ungated * activation_slope(p.activation, z, sigmoid_z), lanes);
        upstream = upstream * activate(p.activation, z, sigmoid_z);
      }
      if (dweight) Vec::store(dweight + i, fma(upstream, n, Vec::load(dweight + i, lanes)), lanes);
      if (dbias) Vec::store(dbias + i, upstream + Vec::load(dbias + i, lanes), lanes);
      const Vec g = upstream * weight;
      dot.add_product(g, n, part);
      total.add(g, part);
    };
    sweep_sums<Vec>(width, take_sums, dot, total);

    const Vec minus_mean_dot = Vec::set(-(dot.total() * share));
    const Vec mean_g = Vec::set(p.kind == Kind::layer ? total.total() * share : Scalar(0));
    sweep<Vec>(width, [&](int64_t i, auto lanes) {
      next_dy.prefetch(i);
      next_x.prefetch(i);
      if constexpr (gated) next_gate.prefetch(i);
      Vec upstream = dy.load(i, lanes);
      const Vec source = x.load(i, lanes);
      Vec v = source;
      Vec z, sigmoid_z, activated;
      if constexpr (gated) {
        z = gate.load(i, lanes);
        sigmoid_z = Vec::load(scratch.sigmoid + i, lanes);
        activated = activate(p.activation, z, sigmoid_z);
      }
      if constexpr (form == Form::gate_before) v = v * activated;
      if constexpr (form == Form::gate_after) upstream = upstream * activated;
      const Vec g = upstream * Vec::load(scratch.weight + i, lanes);
      const Vec n = (v - centre) * factor;
      Vec result = fma(n, minus_mean_dot, g - mean_g) * factor;
      if constexpr (form == Form::gate_before) {
        dgate.store(i, result * source * activation_slope(p.activation, z, sigmoid_z), lanes);
        result = result * activated;
      }
      if constexpr (form == Form::add) result = result + dresidual_out.load(i, lanes);
      dx.store(i, result, lanes);
      if (p.dresidual.data) dresidual.store(i, result, lanes);
    });
  }
}

template <class Body>
INLAY_INLINE void with_form(const BackwardParams& p, Body body) {
  if (p.dresidual_out.data) {
    body(FormConstant<Form::add>{});
  } else if (!p.gate.data) {
    body(FormConstant<Form::plain>{});
  } else if (p.gate_first) {
    body(FormConstant<Form::gate_before>{});
  } else {
    body(FormConstant<Form::gate_after>{});
  }
}

INLAY_INLINE bool has_uniform_dtype(const BackwardParams& p) {
  const auto agrees = [&](const auto& tensor) { return !tensor.data || tensor.dtype == p.dx.dtype; };
  return agrees(p.dy) && agrees(p.dresidual_out) && agrees(p.x) && agrees(p.gate) && agrees(p.dresidual);
}

template <class Vec>
void backward(const BackwardParams& p, int64_t begin, int64_t end, int64_t groups, void* memory, bool stream) {
  using Scalar = typename Vec::Scalar;
  const int64_t width = p.width;
  Scalar* rows = static_cast<Scalar*>(memory);
  const BackwardScratch<Scalar> scratch{rows, rows + width, rows + 2 * width};
  widen<Vec>(p.weight, width, p.weight_offset, 1, scratch.weight);
  if (p.gate.data) widen<Vec>(p.bias, width, 0, 0, scratch.bias);
  const int64_t sums = (p.dweight.data != nullptr) + (p.dbias.data != nullptr);
  for (int64_t group = begin; group < end; ++group) {
    Scalar* partial = static_cast<Scalar*>(p.partials) + group * sums * width;
    for (int64_t i = 0; i < sums * width; ++i) partial[i] = 0;
    Scalar* dweight = p.dweight.data ? partial : nullptr;
    Scalar* dbias = p.dbias.data ? partial + (sums - 1) * width : nullptr;
    const int64_t first = group_begin(p.rows, groups, group);
    const int64_t last = group_begin(p.rows, groups, group + 1);
    with_element_type<Vec>(p.dx.dtype, has_uniform_dtype(p), [&](auto type) {
      with_form(p, [&](auto form) {
        backward_rows<Vec, typename decltype(type)::type, decltype(form)::value>(p, first, last, scratch, dweight,
                                                                                 dbias, stream);
      });
    });
  }
  if (stream) Vec::stream_fence();
}

template <class Vec>
void sum_partials(const BackwardParams& p, int64_t begin, int64_t end) {
  using Scalar = typename Vec::Scalar;
  using T = typename AnyFor<Scalar>::type;
  const OutputTensor* outputs[] = {&p.dweight, &p.dbias};
  const int64_t sums = (p.dweight.data != nullptr) + (p.dbias.data != nullptr);
  const Scalar* partial = static_cast<const Scalar*>(p.partials);
  for (const OutputTensor* output : outputs) {
    if (!output->data) continue;
    const RowWriter<Vec, T> writer(*output, 0, p.width, false);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kSumBlock;
      const int64_t count = smaller(kSumBlock, p.width - first);
      Scalar totals[kSumBlock];
      add_groups(partial + first, p.partial_rows, sums * p.width, count, totals);
      sweep<Vec>(count, [&](int64_t i, auto lanes) { writer.store(first + i, Vec::load(totals + i, lanes), lanes); });
    }
    partial += p.width;
  }
}

}  // namespace
}  // namespace inlay::norm
