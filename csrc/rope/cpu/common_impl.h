// What the forward and backward kernels share.
#pragma once

#include "common/cpu/dispatch.h"
#include "common/cpu/row_access.h"
#include "common/cpu/sweep.h"
#include "common/cpu/weights.h"
#include "rope/cpu/kernels.h"

namespace inlay::rope {
namespace {

using namespace inlay::cpu;

template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};

template <class Scalar>
struct Scratch {
  Scalar* cos;  // of every channel that is rotated
  Scalar* sin;  // the same, negative for the first channel of each pair: y = x cos + partner sin for both
  Scalar* q_weight;
  Scalar* k_weight;
};

template <class Vec>
Scratch<typename Vec::Scalar> make_scratch(const Problem& p, const VectorTensor& q_weight, const VectorTensor& k_weight,
                                           typename Vec::Scalar* memory) {
  const Scratch<typename Vec::Scalar> scratch{memory, memory + p.width, memory + 2 * p.width, memory + 3 * p.width};
  if (p.normalises) {
    widen<Vec>(q_weight, p.width, p.weight_offset, 1, scratch.q_weight);
    widen<Vec>(k_weight, p.width, p.weight_offset, 1, scratch.k_weight);
  }
  return scratch;
}

// A token's angles as Scratch has them.
template <class Vec, class Scalar = typename Vec::Scalar>
void load_angles(const Problem& p, int64_t batch, int64_t token, const Scratch<Scalar>& scratch) {
  with_element_type<Vec>(p.angles, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* cos = static_cast<const T*>(p.cos.data) + p.cos.offset(batch, token);
    const T* sin = static_cast<const T*>(p.sin.data) + p.sin.offset(batch, token);
    sweep<Vec>(p.angle_columns(), [&](int64_t i, auto lanes) {
      Vec::store(scratch.cos + i, Vec::load(cos + i, lanes), lanes);
      Vec::store(scratch.sin + i, Vec::load(sin + i, lanes), lanes);
    });
  });
  if (p.one_angle_per_pair) {  // from the last channel down: none is written before it was read
    for (int64_t i = p.rotary - 1; i >= 0; --i) {
      scratch.cos[i] = scratch.cos[p.angle_column(i)];
      scratch.sin[i] = scratch.sin[p.angle_column(i)];
    }
  }
  const int64_t step = p.interleaved ? 2 : 1;
  for (int64_t i = 0; i < p.half(); ++i) scratch.sin[i * step] = -scratch.sin[i * step];
}

// Whether every vector that is stored lies at a multiple of its size where whole rows do.
template <class Vec>
INLAY_INLINE bool has_whole_vectors(const Problem& p) {
  return p.rotary % Vec::lanes == 0 && (p.interleaved || p.half() % Vec::lanes == 0);
}

// Calls body(Type<T>{}, Flag<normalises>{}, Flag<interleaved>{}).
template <class Vec, class Body>
INLAY_INLINE void with_kernel(const Problem& p, Body body) {
  with_element_type<Vec>(p.dtype, [&](auto type) {
    if (p.normalises) {
      p.interleaved ? body(type, Flag<true>{}, Flag<true>{}) : body(type, Flag<true>{}, Flag<false>{});
    } else {
      p.interleaved ? body(type, Flag<false>{}, Flag<true>{}) : body(type, Flag<false>{}, Flag<false>{});
    }
  });
}

}  // namespace
}  // namespace inlay::rope
