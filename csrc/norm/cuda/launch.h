// Which kernel serves which parameters. Instantiated in instantiations/ and general.cu.
#pragma once

#include "common/cuda/launch.cuh"
#include "norm/cuda/config.h"
#include "norm/params.h"

namespace inlay::norm::cuda {

using inlay::cuda::Launch;

// The register kernel for rows of forward_shapes<kRole>()[shape] / kBackwardShapes[shape].
template <typename T, Role kRole>
Launch<ForwardParams> register_forward(const ForwardParams& params, int shape);
template <typename T, Role kRole>
Launch<BackwardParams> register_backward(const BackwardParams& params, int shape);

// The kernel for everything else; `wide` when 16-byte accesses are possible.
Launch<ForwardParams> general_forward(const ForwardParams& params, bool wide);
Launch<BackwardParams> general_backward(const BackwardParams& params, bool wide);

}  // namespace inlay::norm::cuda
