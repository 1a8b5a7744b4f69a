// Plain scalar version; the tiered kernels replace it.
#include "norm/params.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <vector>

namespace inlay::norm {
namespace {
template <class A> A load(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::bf16: return static_cast<float>(static_cast<const c10::BFloat16*>(p)[i]);
    case DType::f16: return static_cast<float>(static_cast<const c10::Half*>(p)[i]);
    case DType::f64: return static_cast<A>(static_cast<const double*>(p)[i]);
  }
  return 0;
}
template <class A> void store(void* p, DType t, int64_t i, A v) {
  switch (t) {
    case DType::f32: static_cast<float*>(p)[i] = static_cast<float>(v); break;
    case DType::bf16: static_cast<c10::BFloat16*>(p)[i] = static_cast<float>(v); break;
    case DType::f16: static_cast<c10::Half*>(p)[i] = static_cast<float>(v); break;
    case DType::f64: static_cast<double*>(p)[i] = static_cast<double>(v); break;
  }
}
template <class A> A round_to(DType t, A v) {
  if (t == DType::bf16) return static_cast<float>(c10::BFloat16(static_cast<float>(v)));
  if (t == DType::f16) return static_cast<float>(c10::Half(static_cast<float>(v)));
  return v;
}
DType wider(DType a, DType b) { return a == b ? a : DType::f32; }
template <class A> A act(Activation a, A z) {
  const A s = A(1) / (A(1) + std::exp(-z));
  return a == Activation::silu ? z * s : s;
}
template <class A> A act_grad(Activation a, A z) {
  const A s = A(1) / (A(1) + std::exp(-z));
  return a == Activation::silu ? s * (1 + z * (1 - s)) : s * (1 - s);
}

template <class A> void forward_rows(const ForwardParams& p, int64_t begin, int64_t end) {
  std::vector<A> u(p.width);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t xo = p.x.layout.offset(r);
    A sum = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      A v = load<A>(p.x.data, p.x.dtype, xo + i);
      if (p.residual.data) {
        v += load<A>(p.residual.data, p.residual.dtype, p.residual.layout.offset(r) + i);
        v = round_to(p.residual_out.dtype, v);
        store(p.residual_out.data, p.residual_out.dtype, r * p.width + i, v);
      }
      if (p.gate.data && p.gate_first) v *= act(p.activation, load<A>(p.gate.data, p.gate.dtype, p.gate.layout.offset(r) + i));
      u[i] = v;
      sum += v;
    }
    const A mean = p.kind == Kind::layer ? sum / p.width : A(0);
    A square = 0;
    for (int64_t i = 0; i < p.width; ++i) square += (u[i] - mean) * (u[i] - mean);
    const A rstd = A(1) / std::sqrt((p.kind == Kind::l2 ? square : square / p.width) + static_cast<A>(p.eps));
    if (p.mean) static_cast<A*>(p.mean)[r] = mean;
    if (p.rstd) static_cast<A*>(p.rstd)[r] = rstd;
    const bool stepwise = p.rounding == Rounding::stepwise;
    for (int64_t i = 0; i < p.width; ++i) {
      A v = (u[i] - mean) * rstd;
      DType t = p.x.dtype;
      if (stepwise) v = round_to(t, v);
      if (p.weight.data) {
        v *= load<A>(p.weight.data, p.weight.dtype, i) + static_cast<A>(p.weight_offset);
        t = wider(t, p.weight.dtype);
        if (stepwise) v = round_to(t, v);
      }
      if (p.bias.data) {
        v += load<A>(p.bias.data, p.bias.dtype, i);
        t = wider(t, p.bias.dtype);
        if (stepwise) v = round_to(t, v);
      }
      if (p.gate.data && !p.gate_first) v *= act(p.activation, load<A>(p.gate.data, p.gate.dtype, p.gate.layout.offset(r) + i));
      store(p.y.data, p.y.dtype, r * p.width + i, v);
    }
  }
}

template <class A> void backward_group(const BackwardParams& p, int64_t begin, int64_t end, A* dweight, A* dbias) {
  std::vector<A> n(p.width), g(p.width);
  for (int64_t r = begin; r < end; ++r) {
    const A rstd = static_cast<const A*>(p.rstd)[r];
    const A mean = p.mean ? static_cast<const A*>(p.mean)[r] : A(0);
    const int64_t xo = p.x.layout.offset(r), go = p.gate.data ? p.gate.layout.offset(r) : 0;
    A dot = 0, total = 0;
    for (int64_t i = 0; i < p.width; ++i) {
      A x = load<A>(p.x.data, p.x.dtype, xo + i);
      const A z = p.gate.data ? load<A>(p.gate.data, p.gate.dtype, go + i) : A(0);
      if (p.gate.data && p.gate_first) x *= act(p.activation, z);
      n[i] = (x - mean) * rstd;
      A dy = load<A>(p.dy.data, p.dy.dtype, p.dy.layout.offset(r) + i);
      const A w = p.weight.data ? load<A>(p.weight.data, p.weight.dtype, i) + static_cast<A>(p.weight_offset) : A(1);
      if (p.gate.data && !p.gate_first) {
        const A b = p.bias.data ? load<A>(p.bias.data, p.bias.dtype, i) : A(0);
        store(p.dgate.data, p.dgate.dtype, r * p.width + i, dy * (n[i] * w + b) * act_grad(p.activation, z));
        dy *= act(p.activation, z);
      }
      if (dweight) dweight[i] += dy * n[i];
      if (dbias) dbias[i] += dy;
      g[i] = dy * w;
      dot += g[i] * n[i];
      total += g[i];
    }
    const A scale = p.kind == Kind::l2 ? A(1) : A(1) / p.width;
    for (int64_t i = 0; i < p.width; ++i) {
      A dx = rstd * (g[i] - n[i] * dot * scale - (p.kind == Kind::layer ? total * scale : A(0)));
      if (p.gate.data && p.gate_first) {
        const A x = load<A>(p.x.data, p.x.dtype, xo + i), z = load<A>(p.gate.data, p.gate.dtype, go + i);
        store(p.dgate.data, p.dgate.dtype, r * p.width + i, dx * x * act_grad(p.activation, z));
        dx *= act(p.activation, z);
      }
      if (p.dresidual_out.data) dx += load<A>(p.dresidual_out.data, p.dresidual_out.dtype, p.dresidual_out.layout.offset(r) + i);
      store(p.dx.data, p.dx.dtype, r * p.width + i, dx);
      if (p.dresidual.data) store(p.dresidual.data, p.dresidual.dtype, r * p.width + i, dx);
    }
  }
}

template <class A> void backward_all(const BackwardParams& p) {
  const int64_t groups = partial_rows(p), vectors = !!p.dweight.data + !!p.dbias.data;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t b, int64_t e) {
    for (int64_t group = b; group < e; ++group) {
      A* part = p.partials ? static_cast<A*>(p.partials) + group * vectors * p.width : nullptr;
      if (part) std::fill(part, part + vectors * p.width, A(0));
      A* dweight = p.dweight.data ? part : nullptr;
      A* dbias = p.dbias.data ? part + (p.dweight.data ? p.width : 0) : nullptr;
      backward_group<A>(p, p.rows * group / groups, p.rows * (group + 1) / groups, dweight, dbias);
    }
  });
  for (int v = 0; v < vectors; ++v) {
    const OutputTensor& out = v == 0 && p.dweight.data ? p.dweight : p.dbias;
    for (int64_t i = 0; i < p.width; ++i) {
      A s = 0;
      for (int64_t group = 0; group < groups; ++group) s += static_cast<A*>(p.partials)[(group * vectors + v) * p.width + i];
      store(out.data, out.dtype, i, s);
    }
  }
}
}  // namespace

int64_t partial_rows(const BackwardParams& p) { return std::max<int64_t>(1, std::min<int64_t>(p.rows, 64)); }

void forward(const ForwardParams& p, void*) {
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, 16384 / p.width), [&](int64_t b, int64_t e) {
    if (p.x.dtype == DType::f64) forward_rows<double>(p, b, e); else forward_rows<float>(p, b, e);
  });
}
void backward(const BackwardParams& p, void*) {
  if (p.x.dtype == DType::f64) backward_all<double>(p); else backward_all<float>(p);
}
}  // namespace inlay::norm
