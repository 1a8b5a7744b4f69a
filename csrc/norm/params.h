// The norm family's contract between bindings and kernels. The maths is in python/inlay/ops/norm.py.
#pragma once

#include "common/rounding.h"
#include "common/rows.h"

namespace inlay::norm {

// Mirrored by the enums of python/inlay/ops/norm.py.
enum class Kind : int32_t { rms, layer, l2 };
enum class Activation : int32_t { silu, sigmoid };

struct ForwardParams {
  int64_t rows = 0;
  int64_t width = 0;
  RowTensor x;         // [rows, width]
  RowTensor residual;  // [rows, width] or absent; x's dtype or f32
  RowTensor gate;      // [rows, width] or absent; x's dtype. Never together with residual
  VectorTensor weight;
  VectorTensor bias;
  OutputTensor y;             // [rows, width]; x's dtype or f32
  OutputTensor residual_out;  // [rows, width], wanted exactly when residual is given; x's dtype or f32
  void* mean = nullptr;       // [rows] f32 (f64 for f64 x), layer only; null: not wanted
  void* rstd = nullptr;       // [rows] f32 (f64 for f64 x); null: not wanted
  double eps = 0.0;
  double weight_offset = 0.0;
  Kind kind = Kind::rms;
  Rounding rounding = Rounding::once;
  Activation activation = Activation::silu;
  bool gate_first = false;
};

struct BackwardParams {
  int64_t rows = 0;
  int64_t width = 0;
  RowTensor dy;             // [rows, width]; dx's dtype or f32
  RowTensor dresidual_out;  // [rows, width] or absent; dx's dtype or f32
  RowTensor x;              // what was normalised: the forward's x, or its residual_out; dx's dtype or f32
  RowTensor gate;           // [rows, width] or absent; dx's dtype
  VectorTensor weight;
  VectorTensor bias;           // only the gradient of a gate after the norm depends on it
  const void* mean = nullptr;  // [rows], layer only
  const void* rstd = nullptr;  // [rows]
  OutputTensor dx;             // [rows, width]
  OutputTensor dresidual;      // [rows, width], wanted when its dtype differs from dx's
  OutputTensor dgate;          // [rows, width], wanted exactly when gate is given
  OutputTensor dweight;        // [width] or not wanted
  OutputTensor dbias;          // [width] or not wanted
  // Sums over groups of rows, [partial_rows][wanted vectors][width] f32 (f64 for f64 x), dweight before dbias.
  // Summed over the groups in a fixed order, so that every run gives the same bits.
  void* partials = nullptr;
  int64_t partial_rows = 0;
  double weight_offset = 0.0;
  Kind kind = Kind::rms;
  Activation activation = Activation::silu;
  bool gate_first = false;
};

// Defined once per library: in norm/cpu/launch.cpp and in norm/cuda/launch.cu.
void forward(const ForwardParams& params, void* stream);
void backward(const BackwardParams& params, void* stream);
// How many groups of rows `backward` sums apart; the binding allocates `partials` for as many.
int64_t partial_rows(const BackwardParams& params);

}  // namespace inlay::norm
