// Rings of buffers in shared memory, and how tiles come there.
#pragma once

#include "common/cuda/tensor_map.cuh"

namespace inlay::attention::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

using namespace inlay::cuda;

// A place in a ring of buffers; the parity is that of the phase in which the buffer gets full.
template <int kSize>
struct RingPlace {
  int index = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void step() {
    if (++index == kSize) {
      index = 0;
      parity ^= 1;
    }
  }
};

// Fetches a box of each panel of a tile.
__device__ __forceinline__ void fetch_panels(uint32_t to, int panels, int panel_bytes, const CUtensorMap& map,
                                             int token, int head, int batch, Barrier& full) {
  expect_bytes(full, panels * panel_bytes, 0);
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel) {
    fetch_box(to + panel * panel_bytes, map, panel * 64, token, head, batch, full);
  }
}

#endif

}  // namespace inlay::attention::cuda
