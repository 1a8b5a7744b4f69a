// The backward for 16-bit values on Hopper.
//
// A block has a tile of keys of one key head, k and v of it in shared memory, and dk and dv of it in the registers of
// two warpgroups. Tiles of queries, of all heads that share the keys, pass by: one warp fetches q, the gradient of o,
// and for each row lse, delta and what it sees. For each,
//
//   S' = k q'            P' = exp(S' - lse)            dv += P' do
//   dP' = v do'          dS' = P' (dP' - delta)        dk += dS' q          dq += dS k
//
// where ' is transposed: rows are keys. Other blocks add to dq as well: in float32, in the scratch memory, as registers
// lie, four consecutive values of a thread at a time. finish_rows() undoes that order.
#pragma once

#include "attention/cuda/backward_by_gradient.cuh"
#include "attention/cuda/backward_by_keys.cuh"
#include "attention/cuda/backward_turns.cuh"

namespace inlay::attention::cuda {

template <class C>
__global__ __launch_bounds__(C::kThreads, 1) void backward_kernel(const __grid_constant__ BackwardArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  char* const memory = dynamic_shared();
  const uint32_t shared = shared_address(memory);
  auto& control = *reinterpret_cast<BackwardControl<C>*>(memory + C::kControlAt);
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
  if (threadIdx.x == 0) {
    init_barrier(control.keys_full, 1);
    for (int i = 0; i < C::kStages; ++i) {
      init_barrier(control.full[i], 2);
      init_barrier(control.free[i], C::kGroups * 4);
    }
    for (int i = 0; i < 2; ++i) {
      init_barrier(control.probabilities_full[i], 4);
      init_barrier(control.scores_full[i], 4);
      init_barrier(control.sums[i].full, 4);
      init_barrier(control.sums[i].free, 1);
    }
    publish_barriers();
  }
  wait_for_predecessor();
  release_successor();
  if (warp == 0) {
    const KeyTileInfo info =
        describe_key_tile<C::kQueries, C::kKeys>(arguments.params.inputs, arguments.order, blockIdx.x);
    if (threadIdx.x == 0) control.info = info;
  }
  __syncthreads();
  const KeyTileInfo& info = control.info;
  if (info.row_count == 0) return;
  if (warp < 4) {
    leave_registers<24>();
    if (info.first_tile == info.end_tile) return;
    if (warp == 0) fetch_for_key_tile<C>(arguments, control, shared, info);
    if ((warp == 1 || warp == 2) && threadIdx.x % 32 == 0) {
      const int group = warp - 1;
      const uint32_t sums = shared + C::kSumsAt + group * C::kSumBytes;
      if (arguments.turns) {
        add_in_turn<C>(arguments, control.sums[group], info, sums, group);
      } else if (C::kSumBytes > 0) {
        add_sums<C>(arguments, control.sums[group], sums, group);
      }
    }
  } else {
    take_registers<240>();
    if constexpr (C::kKeys == 128) {
      compute_half_of_keys<C>(arguments, control, shared, info, warp / 4 - 1);
    } else if (warp / 4 == 1) {
      compute_value_gradients<C>(arguments, control, shared, info);
    } else {
      compute_key_gradients<C>(arguments, control, shared, info);
    }
  }
#endif
}

}  // namespace inlay::attention::cuda
