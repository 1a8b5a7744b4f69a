// Sixteen floats in AVX-512 F, BW, VL and DQ, with AVX512_BF16's conversion where the compiler's flags allow it.
// The interface is described in vec_generic.h.
#pragma once

#include <immintrin.h>

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

INLAY_INLINE __m512 widen(__m256i bits, bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLAY_INLINE __m512 widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }

// A NaN becomes the one with all bits set, as rounding could carry it into infinity.
INLAY_INLINE __m512i bf16_in_upper_half(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(-1));
}
INLAY_INLINE __m256i narrow(__m512 v, bf16) {
#ifdef __AVX512BF16__
  // The instruction takes subnormal numbers for zero, whatever the rounding mode says. They are rare: test for them.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kSubnormal) == 0, 1)) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  }
#endif
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bf16_in_upper_half(v), 16));
}
INLAY_INLINE __m256i narrow(__m512 v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INLAY_INLINE __mmask16 lane_mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

struct Avx512Vec {
  using Scalar = float;
  static constexpr int64_t lanes = 16;
  __m512 raw;

  Avx512Vec() = default;
  INLAY_INLINE Avx512Vec(__m512 raw) : raw(raw) {}

  INLAY_INLINE static Avx512Vec set(float value) { return _mm512_set1_ps(value); }

  INLAY_INLINE static Avx512Vec load(const float* p, Full) { return _mm512_loadu_ps(p); }
  INLAY_INLINE static Avx512Vec load(const float* p, Partial part) {
    return _mm512_maskz_loadu_ps(lane_mask(part.count), p);
  }
  template <class E>
  INLAY_INLINE static Avx512Vec load(const E* p, Full) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), E{});
  }
  template <class E>
  INLAY_INLINE static Avx512Vec load(const E* p, Partial part) {
    return widen(_mm256_maskz_loadu_epi16(lane_mask(part.count), p), E{});
  }

  INLAY_INLINE static void store(float* p, Avx512Vec v, Full) { _mm512_storeu_ps(p, v.raw); }
  INLAY_INLINE static void store(float* p, Avx512Vec v, Partial part) {
    _mm512_mask_storeu_ps(p, lane_mask(part.count), v.raw);
  }
  template <class E>
  INLAY_INLINE static void store(E* p, Avx512Vec v, Full) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v.raw, E{}));
  }
  template <class E>
  INLAY_INLINE static void store(E* p, Avx512Vec v, Partial part) {
    _mm256_mask_storeu_epi16(p, lane_mask(part.count), narrow(v.raw, E{}));
  }

  INLAY_INLINE static void stream(float* p, Avx512Vec v) { _mm512_stream_ps(p, v.raw); }
  template <class E>
  INLAY_INLINE static void stream(E* p, Avx512Vec v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v.raw, E{}));
  }
  INLAY_INLINE static void stream_fence() { _mm_sfence(); }

  template <class E>
  INLAY_INLINE static Avx512Vec round(Avx512Vec v, E) {
    return widen(narrow(v.raw, E{}), E{});
  }

  INLAY_INLINE static Avx512Vec keep(Avx512Vec v, Full) { return v; }
  INLAY_INLINE static Avx512Vec keep(Avx512Vec v, Partial part) {
    return _mm512_maskz_mov_ps(lane_mask(part.count), v.raw);
  }

  INLAY_INLINE static Avx512Vec swap_pairs(Avx512Vec v) { return _mm512_permute_ps(v.raw, 0b10110001); }

  // Within each quarter of four lanes first, four vectors at a time, then across the quarters.
  INLAY_INLINE static void transpose(Avx512Vec (&vectors)[lanes]) {
    for (int64_t i = 0; i < lanes; i += 4) {
      const __m512 low01 = _mm512_unpacklo_ps(vectors[i].raw, vectors[i + 1].raw);
      const __m512 high01 = _mm512_unpackhi_ps(vectors[i].raw, vectors[i + 1].raw);
      const __m512 low23 = _mm512_unpacklo_ps(vectors[i + 2].raw, vectors[i + 3].raw);
      const __m512 high23 = _mm512_unpackhi_ps(vectors[i + 2].raw, vectors[i + 3].raw);
      vectors[i] = _mm512_shuffle_ps(low01, low23, 0x44);
      vectors[i + 1] = _mm512_shuffle_ps(low01, low23, 0xee);
      vectors[i + 2] = _mm512_shuffle_ps(high01, high23, 0x44);
      vectors[i + 3] = _mm512_shuffle_ps(high01, high23, 0xee);
    }
    for (int64_t i = 0; i < 4; ++i) {
      const __m512 front01 = _mm512_shuffle_f32x4(vectors[i].raw, vectors[i + 4].raw, 0x44);
      const __m512 back01 = _mm512_shuffle_f32x4(vectors[i].raw, vectors[i + 4].raw, 0xee);
      const __m512 front23 = _mm512_shuffle_f32x4(vectors[i + 8].raw, vectors[i + 12].raw, 0x44);
      const __m512 back23 = _mm512_shuffle_f32x4(vectors[i + 8].raw, vectors[i + 12].raw, 0xee);
      vectors[i] = _mm512_shuffle_f32x4(front01, front23, 0x88);
      vectors[i + 4] = _mm512_shuffle_f32x4(front01, front23, 0xdd);
      vectors[i + 8] = _mm512_shuffle_f32x4(back01, back23, 0x88);
      vectors[i + 12] = _mm512_shuffle_f32x4(back01, back23, 0xdd);
    }
  }
};

INLAY_INLINE Avx512Vec operator+(Avx512Vec a, Avx512Vec b) { return _mm512_add_ps(a.raw, b.raw); }
INLAY_INLINE Avx512Vec operator-(Avx512Vec a, Avx512Vec b) { return _mm512_sub_ps(a.raw, b.raw); }
INLAY_INLINE Avx512Vec operator-(Avx512Vec a) { return _mm512_xor_ps(a.raw, _mm512_set1_ps(-0.0f)); }
INLAY_INLINE Avx512Vec operator*(Avx512Vec a, Avx512Vec b) { return _mm512_mul_ps(a.raw, b.raw); }
INLAY_INLINE Avx512Vec operator/(Avx512Vec a, Avx512Vec b) { return _mm512_div_ps(a.raw, b.raw); }
INLAY_INLINE Avx512Vec fma(Avx512Vec a, Avx512Vec b, Avx512Vec c) { return _mm512_fmadd_ps(a.raw, b.raw, c.raw); }
INLAY_INLINE Avx512Vec min(Avx512Vec a, Avx512Vec b) { return _mm512_min_ps(a.raw, b.raw); }
INLAY_INLINE Avx512Vec max(Avx512Vec a, Avx512Vec b) { return _mm512_max_ps(a.raw, b.raw); }

INLAY_INLINE float sum(Avx512Vec v) { return _mm512_reduce_add_ps(v.raw); }

INLAY_INLINE Avx512Vec round_even(Avx512Vec v) {
  return _mm512_roundscale_ps(v.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
INLAY_INLINE Avx512Vec scale(Avx512Vec v, Avx512Vec n) { return _mm512_scalef_ps(v.raw, n.raw); }

INLAY_INLINE Avx512Vec scale_or_zero(Avx512Vec v, Avx512Vec n) {
  const __mmask16 kept = _mm512_cmp_ps_mask(n.raw, _mm512_set1_ps(-127.0f), _CMP_NEQ_UQ);
  return _mm512_maskz_scalef_ps(kept, v.raw, n.raw);
}

}  // namespace
}  // namespace inlay::cpu
