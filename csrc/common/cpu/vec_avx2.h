// Eight floats in AVX2, FMA and F16C. The interface is described in vec_generic.h.
#pragma once

#include <immintrin.h>

#include "common/cpu/elements.h"

namespace inlay::cpu {
namespace {

// One shuffle of a broadcast load puts each element into the upper half of its lane: cheaper than to widen and shift.
INLAY_INLINE __m256 widen(__m128i bits, bf16) {
  const __m256i upper_halves = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                                -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bits), upper_halves));
}
INLAY_INLINE __m256 widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }

// The bits of v rounded to bf16, in the upper half of every lane; what is in the lower half has no meaning.
// A NaN becomes the one with all bits set, as rounding could carry it into infinity.
INLAY_INLINE __m256i bf16_in_upper_half(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return _mm256_or_si256(rounded, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
INLAY_INLINE __m128i narrow(__m256 v, bf16) {
  const __m256i upper_halves =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i quarters = _mm256_shuffle_epi8(bf16_in_upper_half(v), upper_halves);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(quarters, 0b1000));
}
INLAY_INLINE __m128i narrow(__m256 v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

INLAY_INLINE __m256i lane_mask(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

struct Avx2Vec {
  using Scalar = float;
  static constexpr int64_t lanes = 8;
  __m256 raw;

  Avx2Vec() = default;
  INLAY_INLINE Avx2Vec(__m256 raw) : raw(raw) {}

  INLAY_INLINE static Avx2Vec set(float value) { return _mm256_set1_ps(value); }

  INLAY_INLINE static Avx2Vec load(const float* p, Full) { return _mm256_loadu_ps(p); }
  INLAY_INLINE static Avx2Vec load(const float* p, Partial part) {
    return _mm256_maskload_ps(p, lane_mask(part.count));
  }
  template <class E>
  INLAY_INLINE static Avx2Vec load(const E* p, Full) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), E{});
  }
  template <class E>
  INLAY_INLINE static Avx2Vec load(const E* p, Partial part) {
    E elements[lanes] = {};
    for (int64_t i = 0; i < part.count; ++i) elements[i] = p[i];
    return load(elements, Full{});
  }

  INLAY_INLINE static void store(float* p, Avx2Vec v, Full) { _mm256_storeu_ps(p, v.raw); }
  INLAY_INLINE static void store(float* p, Avx2Vec v, Partial part) {
    _mm256_maskstore_ps(p, lane_mask(part.count), v.raw);
  }
  template <class E>
  INLAY_INLINE static void store(E* p, Avx2Vec v, Full) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v.raw, E{}));
  }
  template <class E>
  INLAY_INLINE static void store(E* p, Avx2Vec v, Partial part) {
    E elements[lanes];
    store(elements, v, Full{});
    for (int64_t i = 0; i < part.count; ++i) p[i] = elements[i];
  }

  INLAY_INLINE static void stream(float* p, Avx2Vec v) { _mm256_stream_ps(p, v.raw); }
  template <class E>
  INLAY_INLINE static void stream(E* p, Avx2Vec v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v.raw, E{}));
  }
  INLAY_INLINE static void stream_fence() { _mm_sfence(); }

  INLAY_INLINE static Avx2Vec round(Avx2Vec v, bf16) {
    return _mm256_castsi256_ps(_mm256_and_si256(bf16_in_upper_half(v.raw), _mm256_set1_epi32(0xffff0000)));
  }
  INLAY_INLINE static Avx2Vec round(Avx2Vec v, f16) { return widen(narrow(v.raw, f16{}), f16{}); }

  INLAY_INLINE static Avx2Vec keep(Avx2Vec v, Full) { return v; }
  INLAY_INLINE static Avx2Vec keep(Avx2Vec v, Partial part) {
    return _mm256_and_ps(v.raw, _mm256_castsi256_ps(lane_mask(part.count)));
  }

  INLAY_INLINE static Avx2Vec swap_pairs(Avx2Vec v) { return _mm256_permute_ps(v.raw, 0b10110001); }

  // Within each half of four lanes first, four vectors at a time, then across the halves.
  INLAY_INLINE static void transpose(Avx2Vec (&vectors)[lanes]) {
    for (int64_t i = 0; i < lanes; i += 4) {
      const __m256 low01 = _mm256_unpacklo_ps(vectors[i].raw, vectors[i + 1].raw);
      const __m256 high01 = _mm256_unpackhi_ps(vectors[i].raw, vectors[i + 1].raw);
      const __m256 low23 = _mm256_unpacklo_ps(vectors[i + 2].raw, vectors[i + 3].raw);
      const __m256 high23 = _mm256_unpackhi_ps(vectors[i + 2].raw, vectors[i + 3].raw);
      vectors[i] = _mm256_shuffle_ps(low01, low23, 0x44);
      vectors[i + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
      vectors[i + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
      vectors[i + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
    }
    for (int64_t i = 0; i < 4; ++i) {
      const __m256 first = vectors[i].raw, second = vectors[i + 4].raw;
      vectors[i] = _mm256_permute2f128_ps(first, second, 0x20);
      vectors[i + 4] = _mm256_permute2f128_ps(first, second, 0x31);
    }
  }
};

INLAY_INLINE Avx2Vec operator+(Avx2Vec a, Avx2Vec b) { return _mm256_add_ps(a.raw, b.raw); }
INLAY_INLINE Avx2Vec operator-(Avx2Vec a, Avx2Vec b) { return _mm256_sub_ps(a.raw, b.raw); }
INLAY_INLINE Avx2Vec operator-(Avx2Vec a) { return _mm256_xor_ps(a.raw, _mm256_set1_ps(-0.0f)); }
INLAY_INLINE Avx2Vec operator*(Avx2Vec a, Avx2Vec b) { return _mm256_mul_ps(a.raw, b.raw); }
INLAY_INLINE Avx2Vec operator/(Avx2Vec a, Avx2Vec b) { return _mm256_div_ps(a.raw, b.raw); }
INLAY_INLINE Avx2Vec fma(Avx2Vec a, Avx2Vec b, Avx2Vec c) { return _mm256_fmadd_ps(a.raw, b.raw, c.raw); }
INLAY_INLINE Avx2Vec min(Avx2Vec a, Avx2Vec b) { return _mm256_min_ps(a.raw, b.raw); }
INLAY_INLINE Avx2Vec max(Avx2Vec a, Avx2Vec b) { return _mm256_max_ps(a.raw, b.raw); }

INLAY_INLINE float sum(Avx2Vec v) {
  __m128 part = _mm_add_ps(_mm256_castps256_ps128(v.raw), _mm256_extractf128_ps(v.raw, 1));
  part = _mm_add_ps(part, _mm_movehl_ps(part, part));
  return _mm_cvtss_f32(_mm_add_ss(part, _mm_movehdup_ps(part)));
}

INLAY_INLINE Avx2Vec round_even(Avx2Vec v) {
  return _mm256_round_ps(v.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

INLAY_INLINE Avx2Vec scale(Avx2Vec v, Avx2Vec n) {
  const auto power_of_two = [](__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  };
  const __m256i exponent = _mm256_cvtps_epi32(n.raw);
  const __m256i half = _mm256_srai_epi32(exponent, 1);  // 2^n itself may lie outside the range of normal numbers
  return _mm256_mul_ps(_mm256_mul_ps(v.raw, power_of_two(half)), power_of_two(_mm256_sub_epi32(exponent, half)));
}

INLAY_INLINE Avx2Vec scale_or_zero(Avx2Vec v, Avx2Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.raw), _mm256_set1_epi32(127));
  return _mm256_mul_ps(v.raw, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

}  // namespace
}  // namespace inlay::cpu
