// Products for everything that Hopper's tiles do not serve: float32 (by three tf32 products), other GPUs from sm_80,
// rows or matrices that no bulk copy can read, any sizes.
#pragma once

#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {

constexpr int64_t kGeneralRows = 64;  // a tile's; padded.unit

// a and, if wanted, h from x; then results from a, if wanted.
void general_forward_products(const ForwardSteps& steps, void* stream);

// How many activations a part of weight_parts is of.
int64_t general_part_width();
// a, dh and weight_parts from dy and h; dx from dh; gradients of the matrices.
void general_backward_products(const BackwardSteps& steps, void* stream);

}  // namespace inlay::moe::cuda
