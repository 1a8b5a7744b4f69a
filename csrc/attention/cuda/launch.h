// What the CUDA side's files tell each other.
#pragma once

#include "attention/cuda/config.h"
#include "attention/params.h"

namespace inlay::attention::cuda {

// The forward with the tiles of kForwardShapes[kShape]; T is 16 bits wide. Instantiated in instantiations/.
template <typename T, int kShape>
void forward_tiles(const ForwardParams& params, void* stream);

}  // namespace inlay::attention::cuda
