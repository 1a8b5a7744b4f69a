// What the CUDA side's files tell each other.
#pragma once

#include "attention/cuda/config.h"
#include "attention/params.h"
#include "common/cuda/tensor_map.h"

namespace inlay::attention::cuda {

// The forward with the tiles of kForwardShapes[kShape]; T is 16 bits wide, and tensor maps can describe q, k and v.
// `params.scratch` is a TileOrder's `taken`. Instantiated in instantiations/.
template <typename T, int kShape>
void forward_tiles(const ForwardParams& params, void* stream);

// The backward over tiles of keys with kBackwardShapes[kShape], between prepare_rows() and finish_rows(). Likewise.
struct BackwardScratch;
template <typename T, int kShape>
void backward_tiles(const BackwardParams& params, const BackwardScratch& scratch, void* stream);

// A copy of a tensor of 16-bit values, [batch, tokens, heads, columns].
TokenTensor dense_copy(const inlay::cuda::BoxedTensor& tensor, void* to, void* stream);

}  // namespace inlay::attention::cuda
