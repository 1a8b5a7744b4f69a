#include "gdn/cuda/chunk_backward.cuh"

namespace inlay::gdn::cuda {

template void chunk_backward<__nv_bfloat16, 256>(const BackwardParams&, void*);
template void chunk_backward<__half, 256>(const BackwardParams&, void*);

}  // namespace inlay::gdn::cuda
