// The CUDA side of gdn/params.h for the rule over sequences: the recurrent kernel.
#include "gdn/cuda/recurrent.h"

namespace inlay::gdn {

void forward(const ForwardParams& params, void* stream) {
  cuda::recurrent({params.inputs, params.o, params.inputs.initial_state, params.final_state, {}}, stream);
}

}  // namespace inlay::gdn
