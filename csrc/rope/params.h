// The rope family's contract between bindings and kernels. The maths is in python/inlay/ops/rope.py.
#pragma once

#include "common/rows.h"
#include "common/sequences.h"

namespace inlay::rope {

// cos or sin of a token: so many angles side by side, a dense row for each batch row and token. A table that all batch
// rows share has a batch stride of 0.
struct Table {
  const void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;

  INLAY_HOST_DEVICE int64_t offset(int64_t batch, int64_t token) const {
    return batch * batch_stride + token * token_stride;
  }
};

// What forward and backward are given. The first `rotary` channels of a head are rotated in pairs: (i, i + rotary / 2),
// or (2 i, 2 i + 1) where interleaved; the others pass.
struct Problem {
  int64_t batch = 0;
  int64_t tokens = 0;         // of a batch row
  int64_t width = 0;          // of a head
  int64_t rotary = 0;         // even, at most `width`
  DType dtype = DType::f32;   // of q, k, their results and gradients
  DType angles = DType::f32;  // of cos and sin
  Table cos;
  Table sin;
  bool interleaved = false;
  bool one_angle_per_pair = false;  // tables have rotary / 2 columns, else `rotary`: one for each channel
  bool normalises = false;          // both q and k have weights
  double eps = 0.0;
  double weight_offset = 0.0;

  INLAY_HOST_DEVICE int64_t half() const { return rotary / 2; }
  INLAY_HOST_DEVICE int64_t angle_columns() const { return one_angle_per_pair ? half() : rotary; }
  // The column of a channel's angle.
  INLAY_HOST_DEVICE int64_t angle_column(int64_t channel) const {
    if (!one_angle_per_pair) return channel;
    return interleaved ? channel / 2 : channel < half() ? channel : channel - half();
  }
};

// q or k. The roundings are to `dtype`, where that has 16 bits.
struct ForwardSide {
  int64_t heads = 0;
  TokenTensor x;
  VectorTensor weight;             // [width] or absent
  OutputTensor y;                  // [batch, tokens, heads, width]
  bool rounds_normalised = false;  // before the weight
  bool rounds_weighted = false;    // behind the weight
  bool rounds_products = false;    // with cos and with sin; only where `angles` is `dtype`
};

struct ForwardParams : Problem {
  ForwardSide q;
  ForwardSide k;
};

struct BackwardSide {
  int64_t heads = 0;
  TokenTensor dy;
  TokenTensor x;         // only looked at to normalise
  VectorTensor weight;   // [width] or absent
  OutputTensor dx;       // [batch, tokens, heads, width]
  OutputTensor dweight;  // [width] or not wanted
  // Sums over groups of rows, [partial_rows][width] f32 (f64 for f64 x), where dweight is wanted. Added in a fixed
  // order, so that every run gives the same bits.
  void* partials = nullptr;
  int64_t partial_rows = 0;
};

struct BackwardParams : Problem {
  BackwardSide q;
  BackwardSide k;
};

struct PartialRows {
  int64_t q = 0;
  int64_t k = 0;
};

// Defined once per library: in rope/cpu/launch.cpp and in rope/cuda/launch.cu.
void forward(const ForwardParams& params, void* stream);
void backward(const BackwardParams& params, void* stream);
// How many groups of rows `backward` sums apart; the binding allocates `partials` for as many. `dx` and `partials` are
// not looked at.
PartialRows partial_rows(const BackwardParams& params);

}  // namespace inlay::rope
