// Products by Hopper's tensor cores, for 16-bit values that its copy engine can read.
#pragma once

#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {

// `dy`: of a backward, else null.
bool fits_tiles(const ExpertInputs& in, const RowTensor* dy);

// a and h from x, as far as wanted.
void tiled_activations(const ForwardSteps& steps, void* stream);
// results from a.
void tiled_results(const ForwardSteps& steps, void* stream);
// Both, results if wanted.
void tiled_forward_products(const ForwardSteps& steps, void* stream);

// How many activations a part of weight_parts is of.
int64_t tiled_part_width();
// a, dh and weight_parts from dy and h, as far as wanted.
void tiled_activation_gradients(const BackwardSteps& steps, void* stream);
// dx from dh.
void tiled_input_gradients(const BackwardSteps& steps, void* stream);
// Those that are wanted.
void tiled_matrix_gradients(const BackwardSteps& steps, void* stream);
// All of them, as far as wanted.
void tiled_backward_products(const BackwardSteps& steps, void* stream);

}  // namespace inlay::moe::cuda
