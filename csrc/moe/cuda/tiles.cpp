// Setting up the Hopper kernels: tensor maps of matrices and rows, and which instantiation.
#include "moe/cuda/tiles.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/cuda/runtime.h"
#include "common/cuda/tensor_map.h"
#include "moe/cuda/tile_launch.h"

namespace inlay::moe::cuda {
namespace {

using inlay::cuda::BoxedTensor;

// Experts as a batch. Gates, and what they gate, are two heads where tiles take turns between them.
BoxedTensor boxed(const ExpertMatrices& matrices, const ExpertInputs& in, int64_t rows, int64_t columns,
                  bool rows_are_halves, bool columns_are_halves) {
  BoxedTensor tensor;
  const int64_t heads = rows_are_halves || columns_are_halves ? 2 : 1;
  tensor.batch = in.experts;
  tensor.tokens = rows_are_halves ? rows / 2 : rows;
  tensor.heads = heads;
  tensor.columns = columns_are_halves ? columns / 2 : columns;
  tensor.rows = 64;
  tensor.tensor.data = matrices.data;
  tensor.tensor.dtype = matrices.dtype;
  tensor.tensor.batch_stride = matrices.expert_stride;
  tensor.tensor.token_stride = matrices.row_stride;
  tensor.tensor.head_stride = rows_are_halves ? tensor.tokens * matrices.row_stride : tensor.columns;
  return tensor;
}

bool has_halves(const ExpertInputs& in) { return in.gating.gated && !in.gating.interleaved; }

BoxedTensor first_matrix(const ExpertInputs& in, bool halves) {
  const int64_t width = in.pre_activations();
  return in.transposed ? boxed(in.gate_up_proj, in, in.hidden, width, false, halves)
                       : boxed(in.gate_up_proj, in, width, in.hidden, halves, false);
}

BoxedTensor second_matrix(const ExpertInputs& in) {
  return in.transposed ? boxed(in.down_proj, in, in.intermediate, in.hidden, false, false)
                       : boxed(in.down_proj, in, in.hidden, in.intermediate, false, false);
}

BoxedTensor padded_rows(const ExpertInputs& in, const void* data, int64_t capacity, int64_t columns, int box_rows) {
  BoxedTensor tensor;
  tensor.batch = tensor.heads = 1;
  tensor.tokens = capacity;
  tensor.columns = columns;
  tensor.rows = box_rows;
  tensor.tensor.data = data;
  tensor.tensor.dtype = in.x.dtype;
  tensor.tensor.token_stride = columns;
  return tensor;
}

bool fits_gathering(const RowTensor& x) {
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.layout.evenly_spaced() && x.layout.outer_stride % 8 == 0 &&
         x.layout.outer_stride < int64_t{1} << 31;
}

TileTable tile_table(const ExpertInputs& in, const Rows& rows, const PaddedRows& padded) {
  return {rows.ends, padded.units_before, padded.tiles_before, padded.tiles_taken, static_cast<int>(in.experts)};
}

RowProductArguments common_arguments(const ExpertInputs& in, const Rows& rows, const PaddedRows& padded) {
  RowProductArguments arguments{};
  arguments.tokens = padded.tokens;
  arguments.table = tile_table(in, rows, padded);
  arguments.gating = in.gating;
  arguments.intermediate = static_cast<int>(in.intermediate);
  arguments.slots = rows.slots;
  arguments.capacity = padded.capacity;
  return arguments;
}

void set_columns(RowProductArguments& arguments, int64_t depth, int64_t columns) {
  arguments.depth = static_cast<int>(depth);
  arguments.column_tiles = static_cast<int>(divide_up(columns, kTileColumns));
}

template <typename T, RowStep kStep>
void start_as(const RowProductArguments& arguments, bool transposed, int64_t tiles, void* stream) {
  if (transposed) {
    start_row_product<RowProductConfig<T, kStep, true>>(arguments, tiles, stream);
  } else {
    start_row_product<RowProductConfig<T, kStep, false>>(arguments, tiles, stream);
  }
}

// `transposed`: the matrix has what is summed over as rows.
template <RowStep kStep>
void start(const ExpertInputs& in, const RowProductArguments& arguments, bool transposed, void* stream) {
  const int64_t tiles = arguments.capacity / kPaddedUnit * arguments.column_tiles;
  if (in.x.dtype == DType::bf16) {
    start_as<__nv_bfloat16, kStep>(arguments, transposed, tiles, stream);
  } else {
    start_as<__half, kStep>(arguments, transposed, tiles, stream);
  }
}

template <typename T>
void start_gradient_as(const MatrixGradientArguments& arguments, bool turns_over, void* stream) {
  if (turns_over) {
    start_matrix_gradient<MatrixGradientConfig<T, true>>(arguments, stream);
  } else {
    start_matrix_gradient<MatrixGradientConfig<T, false>>(arguments, stream);
  }
}

// Of a matrix [hidden, columns] or, turned over, [columns, hidden].
void matrix_gradient(const BackwardSteps& steps, const RowTensor& gathered, const void* columns, int64_t columns_count,
                     const OutputTensor& gradient, bool turns_over, void* stream) {
  const ExpertInputs& in = steps.inputs;
  MatrixGradientArguments arguments{};
  arguments.columns =
      make_tensor_map(padded_rows(in, columns, steps.padded.capacity, columns_count, TileMemory<64>::kDepth));
  arguments.gathered = gathered.data;
  arguments.gathered_stride = static_cast<uint32_t>(gathered.layout.outer_stride * 2);
  arguments.tokens = steps.padded.tokens;
  arguments.units = steps.padded.units_before;
  arguments.hidden = static_cast<int>(in.hidden);
  arguments.columns_count = static_cast<int>(columns_count);
  arguments.hidden_tiles = static_cast<int>(divide_up(in.hidden, kTileRows));
  arguments.column_tiles = static_cast<int>(divide_up(columns_count, kTileColumns));
  arguments.tiles = static_cast<int>(in.experts) * arguments.hidden_tiles * arguments.column_tiles;
  const int64_t rows = turns_over ? columns_count : in.hidden, row = turns_over ? in.hidden : columns_count;
  arguments.gradient =
      make_tensor_map(boxed({gradient.data, in.x.dtype, rows * row, row}, in, rows, row, false, false));
  if (in.x.dtype == DType::bf16) {
    start_gradient_as<__nv_bfloat16>(arguments, turns_over, stream);
  } else {
    start_gradient_as<__half>(arguments, turns_over, stream);
  }
}

}  // namespace

bool fits_tiles(const ExpertInputs& in, const RowTensor* dy) {
  if (!inlay::cuda::is_hopper() || (in.x.dtype != DType::bf16 && in.x.dtype != DType::f16)) return false;
  constexpr int64_t kMost = int64_t{1} << 31;
  const int64_t matrix_tiles =
      in.experts * divide_up(in.hidden, kTileRows) * divide_up(in.pre_activations(), kTileColumns);
  const int64_t row_tiles =
      padded_capacity(in, kPaddedUnit) / kPaddedUnit *
      divide_up(in.hidden < in.pre_activations() ? in.pre_activations() : in.hidden, kTileColumns);
  return in.experts < kMost && in.hidden % 8 == 0 && in.intermediate % 8 == 0 && matrix_tiles < kMost &&
         row_tiles < kMost && padded_capacity(in, kPaddedUnit) < kMost && fits_gathering(in.x) &&
         (dy == nullptr || fits_gathering(*dy)) && fits_tensor_map(first_matrix(in, has_halves(in))) &&
         fits_tensor_map(second_matrix(in));
}

int64_t tiled_part_width() { return kTileColumns; }

void tiled_activations(const ForwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  RowProductArguments first = common_arguments(in, steps.rows, steps.padded);
  first.halves = has_halves(in);
  first.matrix = make_tensor_map(first_matrix(in, first.halves));
  first.gathered = in.x.data;
  first.gathered_stride = static_cast<uint32_t>(in.x.layout.outer_stride * 2);
  // In halves, a tile has as many columns of each.
  set_columns(first, in.hidden,
              first.halves ? divide_up(in.intermediate, kTileColumns / 2) * kTileColumns : in.pre_activations());
  first.bias = in.gate_up_bias;
  first.width = static_cast<int>(in.pre_activations());
  first.h = steps.h;
  first.a = steps.a;
  start<RowStep::kFirst>(in, first, in.transposed, stream);
}

void tiled_results(const ForwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  RowProductArguments second = common_arguments(in, steps.rows, steps.padded);
  second.rows = make_tensor_map(padded_rows(in, steps.a, steps.padded.capacity, in.intermediate, kTileRows));
  second.matrix = make_tensor_map(second_matrix(in));
  set_columns(second, in.intermediate, in.hidden);
  second.bias = in.down_bias;
  second.results = make_tensor_map(padded_rows(in, steps.results, steps.padded.capacity, in.hidden, 64));
  second.width = static_cast<int>(in.hidden);
  start<RowStep::kResults>(in, second, in.transposed, stream);
}

void tiled_forward_products(const ForwardSteps& steps, void* stream) {
  find_tiles(tile_table(steps.inputs, steps.rows, steps.padded), stream);
  tiled_activations(steps, stream);
  if (steps.results != nullptr) tiled_results(steps, stream);
}

void tiled_activation_gradients(const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  RowProductArguments activations = common_arguments(in, steps.rows, steps.padded);
  activations.halves = has_halves(in);
  activations.matrix = make_tensor_map(second_matrix(in));
  activations.gathered = steps.dy.data;
  activations.gathered_stride = static_cast<uint32_t>(steps.dy.layout.outer_stride * 2);
  set_columns(activations, in.hidden, in.intermediate);
  activations.weights = in.weights;
  activations.saved_h = steps.h;
  activations.a = steps.a;
  activations.dh = steps.dh;
  activations.weight_parts = steps.weight_parts;
  start<RowStep::kActivations>(in, activations, !in.transposed, stream);
}

void tiled_input_gradients(const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  RowProductArguments inputs = common_arguments(in, steps.rows, steps.padded);
  inputs.rows = make_tensor_map(padded_rows(in, steps.dh, steps.padded.capacity, in.pre_activations(), kTileRows));
  inputs.matrix = make_tensor_map(first_matrix(in, false));
  set_columns(inputs, in.pre_activations(), in.hidden);
  inputs.results = make_tensor_map(padded_rows(in, steps.dx, steps.padded.capacity, in.hidden, 64));
  inputs.width = static_cast<int>(in.hidden);
  start<RowStep::kResults>(in, inputs, !in.transposed, stream);
}

void tiled_matrix_gradients(const BackwardSteps& steps, void* stream) {
  const ExpertInputs& in = steps.inputs;
  if (steps.ddown_proj.data != nullptr) {
    matrix_gradient(steps, steps.dy, steps.a, in.intermediate, steps.ddown_proj, in.transposed, stream);
  }
  if (steps.dgate_up_proj.data != nullptr) {
    matrix_gradient(steps, in.x, steps.dh, in.pre_activations(), steps.dgate_up_proj, !in.transposed, stream);
  }
}

void tiled_backward_products(const BackwardSteps& steps, void* stream) {
  find_tiles(tile_table(steps.inputs, steps.rows, steps.padded), stream);
  if (steps.a != nullptr || steps.dh != nullptr || steps.weight_parts != nullptr) {
    tiled_activation_gradients(steps, stream);
  }
  if (steps.dx != nullptr) tiled_input_gradients(steps, stream);
  tiled_matrix_gradients(steps, stream);
}

}  // namespace inlay::moe::cuda
