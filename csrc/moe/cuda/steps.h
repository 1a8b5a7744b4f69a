// The steps of the experts on CUDA, each started by its own file, in the order of launch.cpp:
//
//   forward    find_rows, first and second products, combine
//   backward   pad_rows, products, combine_gradients, bias_gradients
//
// The products are the Hopper kernels' (tiles.h), or the general ones' (general.h) for all they do not serve.
#pragma once

#include "moe/params.h"

namespace inlay::moe::cuda {

// What an expert's rows are rounded up to, in what is stored between the steps: so a tile of so many rows is one
// expert's alone, and reading or writing all of it does no harm. Expert e's rows begin at the sum of the others' before
// it, each rounded up; rows in between are padding. Whoever writes a matrix of padded rows writes zeros there, in all
// of a tile that has a row.
struct PaddedRows {
  int32_t unit = 64;
  int64_t capacity = 0;        // at least the padded rows of any choice; a multiple of unit
  int32_t* tokens = nullptr;   // [capacity] of each row its token, -1: padding, or beyond all rows
  int32_t* places = nullptr;   // [T * K] of each slot its padded row, -1: it has no expert
  int32_t* experts = nullptr;  // [capacity / unit] of each unit its expert, -1: beyond all rows
  // [E + 1] units, and tiles of two, before each expert, and before none: written and read by the Hopper kernels.
  int32_t* units_before = nullptr;
  int32_t* tiles_before = nullptr;
  int32_t* tiles_taken = nullptr;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// At most so many experts have a row.
inline int64_t padded_capacity(const ExpertInputs& in, int64_t unit) {
  const int64_t chosen = in.most_rows() < in.experts ? in.most_rows() : in.experts;
  return divide_up(in.most_rows() + chosen * (unit - 1), unit) * unit;
}

// Matrices of padded rows are dense, in x's dtype.
struct ForwardSteps {
  ExpertInputs inputs;
  Rows rows;
  PaddedRows padded;
  void* h = nullptr;        // [T * K, P] in the order of rows, not padded: before the activation; null: not wanted
  void* a = nullptr;        // [capacity, I] activations; null: not wanted
  void* results = nullptr;  // [capacity, H] what experts gave, their second bias included, not weighted
};

struct BackwardSteps {
  ExpertInputs inputs;
  Rows rows;
  PaddedRows padded;
  RowTensor dy;
  const void* h = nullptr;        // [T * K, P] in the order of rows, not padded
  void* a = nullptr;              // [capacity, I] activations times their weight; null: not wanted
  void* dh = nullptr;             // [capacity, P]; null: not wanted
  float* weight_parts = nullptr;  // [parts, capacity] of <dA', a>, dA' the unweighted gradient; null: not wanted
  int64_t parts = 0;              // each is of I / parts activations, rounded up to those of a tile
  void* dx = nullptr;             // [capacity, H] dh times the first matrices; null: not wanted
  OutputTensor dgate_up_proj;     // not wanted: null, likewise
  OutputTensor ddown_proj;
};

// rows.cu. find_rows() writes all of rows and padded, from indices or ends; pad_rows() writes padded from rows.
// Neither waits for the device. A choice below 0 or above E counts as none.
int64_t find_rows_scratch_bytes(const ExpertInputs& in);
void find_rows(const ExpertForwardParams& params, const PaddedRows& padded, void* scratch, void* stream);
void pad_rows(const ExpertInputs& in, const Rows& rows, const PaddedRows& padded, void* stream);

// combine.cu. y = the sum of each token's results, in the order of its slots, times their weights, and what is shared.
void combine(const ExpertForwardParams& params, const PaddedRows& padded, const void* results, void* stream);

// combine_gradients.cu. dx, dweights (from the parts, and <dy, down_bias>), dshared, dshared_gate, as far as wanted.
void combine_gradients(const ExpertBackwardParams& params, const BackwardSteps& steps, void* stream);

// bias_gradients.cu. dgate_up_bias: sums of dh over each expert's rows; ddown_bias: of weight times dy. As far as
// wanted; sums have a fixed order.
int64_t bias_gradients_scratch_bytes(const ExpertBackwardParams& params);
void bias_gradients(const ExpertBackwardParams& params, const BackwardSteps& steps, void* scratch, void* stream);

// few.cu. The whole forward of few tokens, without gradients, in one or two kernels: no rows, no padding.
bool fits_few(const ExpertForwardParams& params);
int64_t few_scratch_bytes(const ExpertForwardParams& params);
void forward_few(const ExpertForwardParams& params, void* stream);  // params.scratch is of that size

}  // namespace inlay::moe::cuda
