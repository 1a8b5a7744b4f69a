// Vectors of 16 bytes in plain C++ (the vector extension of GCC and Clang): SSE2 on x86-64, NEON on Arm.
// This file documents the interface that every vector type has:
//
//   Vec::Scalar, Vec::lanes            float or double, how many
//   Vec::set(s)                        s in every lane
//   Vec::load(p, Full | Partial)       from float, bf16 or f16 memory (double vectors: from double), any alignment
//   Vec::store(p, v, Full | Partial)   to the same, rounding to nearest even, NaN staying NaN
//   Vec::stream(p, v)                  a full store past the caches, to an address aligned to lanes * sizeof(*p)
//   Vec::stream_fence()                after the last `stream`, before another thread may read
//   Vec::round(v, bf16{} | f16{})      what storing and loading gives
//   Vec::keep(v, Full | Partial)       zero beyond the count
//   Vec::swap_pairs(v)                lanes 2 i and 2 i + 1 change places
//   Vec::transpose(vectors)            an array of as many vectors as lanes: rows become columns
//   + - * / of two vectors, -v, fma(a, b, c) = a * b + c, sum(v), min, max
//   round_even(v), scale(v, n)         nearest integer; v * 2^n for integral n in [-151, 128]
//   scale_or_zero(v, n)                v * 2^n for integral n in [-126, 127], zero for n = -127
#pragma once

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

using U16x4 = uint16_t __attribute__((vector_size(8)));
using U32x4 = uint32_t __attribute__((vector_size(16)));
using I32x4 = int32_t __attribute__((vector_size(16)));
using F32x4 = float __attribute__((vector_size(16)));
using F64x2 = double __attribute__((vector_size(16)));

INLAY_INLINE F32x4 widen(U16x4 bits, bf16) {
  return reinterpret_cast<F32x4>(__builtin_convertvector(bits, U32x4) << 16);
}

INLAY_INLINE U16x4 narrow(F32x4 v, bf16) {
  const U32x4 bits = reinterpret_cast<U32x4>(v);
  const U32x4 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (bits >> 16) | 0x40, U16x4);
}

INLAY_INLINE F32x4 widen(U16x4 bits, f16) {
  const U32x4 half = __builtin_convertvector(bits, U32x4);
  const U32x4 magnitude = (half & 0x7fff) << 13;
  const U32x4 smallest_normal = U32x4{} + (113u << 23);  // 2^-14
  const U32x4 normal = magnitude + (112u << 23);         // 112: the difference of the exponents' biases
  const U32x4 infinite = magnitude + (224u << 23);
  const U32x4 subnormal = reinterpret_cast<U32x4>(reinterpret_cast<F32x4>(magnitude + smallest_normal) -
                                                  reinterpret_cast<F32x4>(smallest_normal));
  const U32x4 finite = magnitude < (1u << 23) ? subnormal : normal;
  const U32x4 value = magnitude >= (31u << 23) ? infinite : finite;
  return reinterpret_cast<F32x4>(value | ((half & 0x8000) << 16));
}

INLAY_INLINE U16x4 narrow(F32x4 v, f16) {
  const U32x4 bits = reinterpret_cast<U32x4>(v);
  const U32x4 magnitude = bits & 0x7fffffff;
  const U32x4 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Half precision is spaced 2^-24 below 2^-14, and so is single precision between 0.5 and 1: the addition rounds.
  const F32x4 half = F32x4{} + 0.5f;
  const U32x4 subnormal =
      reinterpret_cast<U32x4>(reinterpret_cast<F32x4>(magnitude) + half) - reinterpret_cast<U32x4>(half);
  const U32x4 finite = magnitude < (113u << 23) ? subnormal : normal;
  const U32x4 infinite = U32x4{} + 0x7c00;
  const U32x4 nan = U32x4{} + 0x7e00;
  const U32x4 value = magnitude > (255u << 23) ? nan : magnitude >= (143u << 23) ? infinite : finite;
  return __builtin_convertvector(value | ((bits >> 16) & 0x8000), U16x4);
}

template <class T>
struct GenericVec;

// What both scalar types share.
template <class T, class Raw, int64_t Lanes>
struct GenericVecBase {
  using Scalar = T;
  static constexpr int64_t lanes = Lanes;
  using Vec = GenericVec<T>;

  INLAY_INLINE static Vec set(T value) { return {Raw{} + value}; }

  INLAY_INLINE static Vec load(const T* p, Full) {
    Vec v;
    memcpy(&v.raw, p, sizeof v.raw);
    return v;
  }
  INLAY_INLINE static Vec load(const T* p, Partial part) {
    Vec v{Raw{}};
    memcpy(&v.raw, p, part.count * sizeof(T));
    return v;
  }
  INLAY_INLINE static void store(T* p, Vec v, Full) { memcpy(p, &v.raw, sizeof v.raw); }
  INLAY_INLINE static void store(T* p, Vec v, Partial part) { memcpy(p, &v.raw, part.count * sizeof(T)); }

  template <class E>
  INLAY_INLINE static void stream(E* p, Vec v) {
    Vec::store(p, v, Full{});
  }
  INLAY_INLINE static void stream_fence() {}

  INLAY_INLINE static Vec keep(Vec v, Full) { return v; }
  INLAY_INLINE static Vec keep(Vec v, Partial part) {
    for (int64_t i = part.count; i < lanes; ++i) v.raw[i] = 0;
    return v;
  }

  INLAY_INLINE static void transpose(Vec (&vectors)[Lanes]) {
    for (int64_t i = 0; i < lanes; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const T element = vectors[i].raw[j];
        vectors[i].raw[j] = vectors[j].raw[i];
        vectors[j].raw[i] = element;
      }
    }
  }
};

template <>
struct GenericVec<double> : GenericVecBase<double, F64x2, 2> {
  F64x2 raw;
  GenericVec() = default;
  INLAY_INLINE GenericVec(F64x2 raw) : raw(raw) {}

  INLAY_INLINE static GenericVec swap_pairs(GenericVec v) { return F64x2{v.raw[1], v.raw[0]}; }
};

template <>
struct GenericVec<float> : GenericVecBase<float, F32x4, 4> {
  F32x4 raw;
  GenericVec() = default;
  INLAY_INLINE GenericVec(F32x4 raw) : raw(raw) {}

  INLAY_INLINE static GenericVec swap_pairs(GenericVec v) { return F32x4{v.raw[1], v.raw[0], v.raw[3], v.raw[2]}; }

  using GenericVecBase::load;
  using GenericVecBase::store;

  template <class E>
  INLAY_INLINE static GenericVec load(const E* p, Full) {
    U16x4 bits;
    memcpy(&bits, p, sizeof bits);
    return widen(bits, E{});
  }
  template <class E>
  INLAY_INLINE static GenericVec load(const E* p, Partial part) {
    U16x4 bits{};
    memcpy(&bits, p, part.count * sizeof(E));
    return widen(bits, E{});
  }
  template <class E>
  INLAY_INLINE static void store(E* p, GenericVec v, Full) {
    const U16x4 bits = narrow(v.raw, E{});
    memcpy(p, &bits, sizeof bits);
  }
  template <class E>
  INLAY_INLINE static void store(E* p, GenericVec v, Partial part) {
    const U16x4 bits = narrow(v.raw, E{});
    memcpy(p, &bits, part.count * sizeof(E));
  }
  template <class E>
  INLAY_INLINE static GenericVec round(GenericVec v, E) {
    return widen(narrow(v.raw, E{}), E{});
  }
};

template <class T>
INLAY_INLINE GenericVec<T> operator+(GenericVec<T> a, GenericVec<T> b) {
  return a.raw + b.raw;
}
template <class T>
INLAY_INLINE GenericVec<T> operator-(GenericVec<T> a, GenericVec<T> b) {
  return a.raw - b.raw;
}
template <class T>
INLAY_INLINE GenericVec<T> operator-(GenericVec<T> a) {
  return -a.raw;
}
template <class T>
INLAY_INLINE GenericVec<T> operator*(GenericVec<T> a, GenericVec<T> b) {
  return a.raw * b.raw;
}
template <class T>
INLAY_INLINE GenericVec<T> operator/(GenericVec<T> a, GenericVec<T> b) {
  return a.raw / b.raw;
}
template <class T>
INLAY_INLINE GenericVec<T> fma(GenericVec<T> a, GenericVec<T> b, GenericVec<T> c) {
  return a.raw * b.raw + c.raw;
}
// The second operand where either is NaN, as x86 has it.
template <class T>
INLAY_INLINE GenericVec<T> min(GenericVec<T> a, GenericVec<T> b) {
  return a.raw < b.raw ? a.raw : b.raw;
}
template <class T>
INLAY_INLINE GenericVec<T> max(GenericVec<T> a, GenericVec<T> b) {
  return a.raw > b.raw ? a.raw : b.raw;
}
INLAY_INLINE double sum(GenericVec<double> v) { return v.raw[0] + v.raw[1]; }
INLAY_INLINE float sum(GenericVec<float> v) { return (v.raw[0] + v.raw[2]) + (v.raw[1] + v.raw[3]); }

INLAY_INLINE GenericVec<float> round_even(GenericVec<float> v) {
  const float shift = 0x1.8p23f;  // numbers of this size have no fraction: adding it rounds
  return (v.raw + shift) - shift;
}

INLAY_INLINE GenericVec<float> scale(GenericVec<float> v, GenericVec<float> n) {
  const I32x4 exponent = __builtin_convertvector(n.raw, I32x4);
  const I32x4 half = exponent >> 1;  // two factors, as 2^n itself may lie outside the range of normal numbers
  return v.raw * reinterpret_cast<F32x4>((half + 127) << 23) * reinterpret_cast<F32x4>((exponent - half + 127) << 23);
}

INLAY_INLINE GenericVec<float> scale_or_zero(GenericVec<float> v, GenericVec<float> n) {
  return v.raw * reinterpret_cast<F32x4>((__builtin_convertvector(n.raw, I32x4) + 127) << 23);
}

// Double precision serves gradient checks, not speed: the C library's functions, lane by lane.
INLAY_INLINE GenericVec<double> exp(GenericVec<double> v) {
  return F64x2{__builtin_exp(v.raw[0]), __builtin_exp(v.raw[1])};
}
INLAY_INLINE GenericVec<double> exp_of_nonpositive(GenericVec<double> v) { return exp(v); }
INLAY_INLINE GenericVec<double> log1p(GenericVec<double> v) {
  return F64x2{__builtin_log1p(v.raw[0]), __builtin_log1p(v.raw[1])};
}

INLAY_INLINE GenericVec<double> tanh(GenericVec<double> v) {
  return F64x2{__builtin_tanh(v.raw[0]), __builtin_tanh(v.raw[1])};
}

}  // namespace
}  // namespace inlay::cpu
