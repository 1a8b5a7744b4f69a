// What of the backward is done once for each row of queries.
#pragma once

#include "attention/cuda/backward_scratch.h"

namespace inlay::attention::cuda {

// Before the products: fills `scratch` but for the copies of q, k and v, and stores dgate. params.dout is aligned.
void prepare_rows(const BackwardParams& params, const BackwardScratch& scratch, void* stream);

// After them: stores dq and dsinks.
void finish_rows(const BackwardParams& params, const BackwardShape& shape, const BackwardScratch& scratch,
                 void* stream);

}  // namespace inlay::attention::cuda
