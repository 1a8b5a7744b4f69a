#include "gdn/cuda/chunk_forward.cuh"

namespace inlay::gdn::cuda {

template void chunk_forward<__nv_bfloat16, 128>(const ForwardParams&, void*);
template void chunk_forward<__half, 128>(const ForwardParams&, void*);

}  // namespace inlay::gdn::cuda
