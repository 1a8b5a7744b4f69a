// Which kernel serves which parameters. The instantiations live in the .cu files of this folder.
#pragma once

#include "common/cuda/launch.cuh"
#include "norm/cuda/maths.cuh"
#include "norm/params.h"

namespace inlay::norm::cuda {

using inlay::cuda::Launch;

// The register kernel for rows of kForwardShapes[shape] / kBackwardShapes[shape].
template <typename T>
Launch<ForwardParams> register_forward(const ForwardParams& params, Role role, int shape);
template <typename T>
Launch<BackwardParams> register_backward(const BackwardParams& params, Role role, int shape);

// The kernel for everything else; `wide` when 16-byte accesses are possible.
Launch<ForwardParams> general_forward(const ForwardParams& params, bool wide);
Launch<BackwardParams> general_backward(const BackwardParams& params, bool wide);

}  // namespace inlay::norm::cuda
