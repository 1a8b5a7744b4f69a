// Forward of the norm family over a vector type. Each row is read once to take its statistics (twice for LayerNorm)
// and once more, from the cache, to be normalised. The maths is in python/inlay/ops/norm.py.
#pragma once

#include "norm/cpu/common_impl.h"

namespace inlay::norm {
namespace {

template <class Scalar>
struct ForwardScratch {
  Scalar* weight;  // with its offset; 1 where there is none
  Scalar* bias;
  Scalar* row;  // what is normalised, where that is not x itself
};

template <class Vec, class T, Form form, bool stepwise>
void forward_rows(const ForwardParams& p, int64_t begin, int64_t end, ForwardScratch<typename Vec::Scalar> scratch,
                  bool stream) {
  using Scalar = typename Vec::Scalar;
  const int64_t width = p.width;
  const bool has_bias = p.bias.data != nullptr;
  const bool is_layer = p.kind == Kind::layer;
  const Scalar count = static_cast<Scalar>(p.kind == Kind::l2 ? 1 : width);
  const Rounder<Vec, T> to_x(p.x.dtype);
  const Rounder<Vec, T> to_residual(p.residual_out.dtype);
  const DType weighted_dtype = !p.weight.data || p.weight.dtype == p.x.dtype ? p.x.dtype : DType::f32;
  const Rounder<Vec, T> to_weighted(weighted_dtype);
  const Rounder<Vec, T> to_biased(p.bias.dtype == weighted_dtype ? weighted_dtype : DType::f32);

  for (int64_t row = begin; row < end; ++row) {
    const RowReader<Vec, T> x(p.x, row);
    const RowReader<Vec, T> residual(p.residual, row);
    const RowReader<Vec, T> gate(p.gate, row);
    const int64_t next = row + 1 < end ? row + 1 : row;
    const RowReader<Vec, T> next_x(p.x, next);
    const RowReader<Vec, T> next_residual(p.residual, next);
    const RowReader<Vec, T> next_gate(p.gate, next);
    const RowWriter<Vec, T> residual_out(p.residual_out, row, width, stream);
    const RowWriter<Vec, T> y(p.y, row, width, stream);

    const auto activated_gate = [&](int64_t i, auto lanes) {
      const Vec z = gate.load(i, lanes);
      return activate(p.activation, z, sigmoid(z));
    };
    // What is normalised, when first seen and afterwards.
    const auto make = [&](int64_t i, auto lanes) {
      Vec v = x.load(i, lanes);
      if constexpr (form == Form::add) {
        v = to_residual(v + residual.load(i, lanes));
        residual_out.store(i, v, lanes);
        Vec::store(scratch.row + i, v, lanes);
      } else if constexpr (form == Form::gate_before) {
        v = v * activated_gate(i, lanes);
        Vec::store(scratch.row + i, v, lanes);
      }
      return v;
    };
    const auto reload = [&](int64_t i, auto lanes) {
      if constexpr (form == Form::add || form == Form::gate_before) {
        return Vec::load(scratch.row + i, lanes);
      } else {
        return x.load(i, lanes);
      }
    };

    Accumulator<Vec> squares;
    Scalar mean = 0;
    if (is_layer) {
      Accumulator<Vec> values;
      sweep_sums<Vec>(width, [&](int64_t i, auto lanes, int part) { values.add(make(i, lanes), part); }, values);
      mean = values.total() / static_cast<Scalar>(width);
      const Vec centre = Vec::set(mean);
      const auto add_square = [&](int64_t i, auto lanes, int part) {
        const Vec v = Vec::keep(reload(i, lanes) - centre, lanes);
        squares.add_product(v, v, part);
      };
      sweep_sums<Vec>(width, add_square, squares);
    } else {
      const auto add_square = [&](int64_t i, auto lanes, int part) {
        if constexpr (form == Form::gate_after) gate.prefetch(i);
        const Vec v = make(i, lanes);
        squares.add_product(v, v, part);
      };
      sweep_sums<Vec>(width, add_square, squares);
    }
    const Scalar rstd = 1 / square_root(squares.total() / count + static_cast<Scalar>(p.eps));
    if (p.mean) static_cast<Scalar*>(p.mean)[row] = mean;
    if (p.rstd) static_cast<Scalar*>(p.rstd)[row] = rstd;

    const Vec centre = Vec::set(mean);
    const Vec factor = Vec::set(rstd);
    sweep<Vec>(width, [&](int64_t i, auto lanes) {
      next_x.prefetch(i);
      if constexpr (form == Form::add) next_residual.prefetch(i);
      if constexpr (form == Form::gate_before) next_gate.prefetch(i);
      Vec v = (reload(i, lanes) - centre) * factor;
      if constexpr (stepwise) v = to_x(v);
      v = v * Vec::load(scratch.weight + i, lanes);
      // Storing rounds, so the last step needs no rounding of its own.
      if (stepwise && (has_bias || form == Form::gate_after)) v = to_weighted(v);
      if (has_bias) {
        v = v + Vec::load(scratch.bias + i, lanes);
        if constexpr (stepwise && form == Form::gate_after) v = to_biased(v);
      }
      if constexpr (form == Form::gate_after) v = v * activated_gate(i, lanes);
      y.store(i, v, lanes);
    });
  }
}

template <class Body>
INLAY_INLINE void with_form(const ForwardParams& p, Body body) {
  if (p.residual.data) {
    body(FormConstant<Form::add>{});
  } else if (!p.gate.data) {
    body(FormConstant<Form::plain>{});
  } else if (p.gate_first) {
    body(FormConstant<Form::gate_before>{});
  } else {
    body(FormConstant<Form::gate_after>{});
  }
}

// Whether all rows, and every value that is rounded on the way, have x's dtype.
INLAY_INLINE bool has_uniform_dtype(const ForwardParams& p) {
  const DType dtype = p.x.dtype;
  const auto agrees = [&](const auto& tensor) { return !tensor.data || tensor.dtype == dtype; };
  const bool vectors_agree = p.rounding == Rounding::once || (agrees(p.weight) && agrees(p.bias));
  return agrees(p.residual) && agrees(p.residual_out) && agrees(p.gate) && agrees(p.y) && vectors_agree;
}

template <class Vec>
void forward(const ForwardParams& p, int64_t begin, int64_t end, void* memory, bool stream) {
  using Scalar = typename Vec::Scalar;
  Scalar* rows = static_cast<Scalar*>(memory);
  const ForwardScratch<Scalar> scratch{rows, rows + p.width, rows + 2 * p.width};
  widen<Vec>(p.weight, p.width, p.weight_offset, 1, scratch.weight);
  if (p.bias.data) widen<Vec>(p.bias, p.width, 0, 0, scratch.bias);
  with_element_type<Vec>(p.x.dtype, has_uniform_dtype(p), [&](auto type) {
    with_form(p, [&](auto form) {
      using T = typename decltype(type)::type;
      if (p.rounding == Rounding::stepwise) {
        forward_rows<Vec, T, decltype(form)::value, true>(p, begin, end, scratch, stream);
      } else {
        forward_rows<Vec, T, decltype(form)::value, false>(p, begin, end, scratch, stream);
      }
    });
  });
  if (stream) Vec::stream_fence();
}

}  // namespace
}  // namespace inlay::norm
