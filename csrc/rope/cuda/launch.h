// Which kernel serves which parameters. Instantiated in instantiations/ and general.cu.
#pragma once

#include "common/cuda/launch.cuh"
#include "rope/cuda/config.h"
#include "rope/params.h"

namespace inlay::rope::cuda {

using inlay::cuda::Launch;

// What a forward kernel computes in. One kernel each, as registers and instructions are what limits them.
enum class Form {
  stepwise,  // all rounded to T, two elements an instruction, with weights of T and no offset
  packed,    // the same from the rotation on; the norm in float32
  wide,      // all in float32
};

// A backward's kernel and how its blocks are dealt out.
struct BackwardLaunch {
  Launch<BackwardParams> launch;
  int64_t q_blocks;
};

// The register kernels for heads of kForwardShapes[shape] / kBackwardShapes[shape]; C: what the angles are in.
template <typename T, Form kForm>
Launch<ForwardParams> register_forward(const ForwardParams& params, int shape);
template <typename T, typename C>
BackwardLaunch register_backward(const BackwardParams& params, int shape);

// The kernels for everything else.
Launch<ForwardParams> general_forward(const ForwardParams& params);
BackwardLaunch general_backward(const BackwardParams& params);

// The grid of a backward: as many blocks as run at once or have work, two at least, since each works on q or on k.
// `work`: how many blocks have some; `at_a_time`: heads of a token that a warp works on at a time.
template <auto Kernel, int kThreads, int kSharedBytes>
BackwardLaunch backward_launch(const BackwardParams& params, int64_t work, int64_t at_a_time) {
  const auto launch = inlay::cuda::resident_launch<Kernel, kThreads, kSharedBytes, BackwardParams>(work < 2 ? 2 : work);
  return {launch, blocks_of_q(launch.blocks, params.q.heads, params.k.heads, at_a_time)};
}

}  // namespace inlay::rope::cuda
