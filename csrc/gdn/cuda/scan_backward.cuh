// The walk back over a head's chunks, which carries the gradient of the state. With the names of chunk.cuh, G the
// gradient of the state after a chunk:
//
//   w = inverse^T (scores^T do + k_out * k G)      so that beta * w is the gradient of v
//   G <- exp(c_end) G + q^T (q_in * do) - k^T (k_in * beta * w)
//
// Transposed as in scan.cuh.
#pragma once

#include "gdn/cuda/scan.cuh"

namespace inlay::gdn::cuda {

struct ScanBackwardParams {
  ChunkParams chunk;
  TokenTensor dout;  // rows start at multiples of 16 bytes, or chunk.aligned is false
  StateTensor dfinal_state;
  StateTensor dinitial_state;
  OutputTensor dv;  // [B, T, Hv, V] T
  void* w;          // BackwardScratch::w
  void* dstates;    // BackwardScratch::dstates
};

template <typename T, int kKeys, int kGroups>
using ScanBackwardMemory = ScanMemory<T, kKeys, kGroups, true, 2>;

template <typename T, int kKeys, int kGroups>
__global__ void __launch_bounds__(ScanTeam<kGroups>::kThreads, 1)
    scan_backward_kernel(const __grid_constant__ ScanBackwardParams p) {
  using Team = ScanTeam<kGroups>;
  using Memory = ScanBackwardMemory<T, kKeys, kGroups>;
  using Stage = ScanStage<Memory, T, kKeys>;  // with do in place of v
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  wait_for_predecessor();
  release_successor();
  const ScanPlace<kGroups> place(in);
  char* const memory = dynamic_shared();
  const ScanPassed<Memory, T, kKeys> passed(memory, place.group);
  const int64_t last = place.chunks - 1;

  init_stages<Stage, Memory::kStages>(memory);
  if (place.role == Role::fetch) {
    leave_registers<Team::kFetchRegisters>();
    const T* const dout = place.template first_row<T>(p.dout, place.head, place.block_column);
    fetch_all<Team, Memory::kStages>(place.chunks, [&](int64_t step, int stage_number) {
      const Stage stage(memory, stage_number);
      const int64_t index = last - step;
      fetch_prepared(stage, p.chunk.prepared, place.key_unit(in, index), place.unit(in, index), place.thread);
      fetch_tile<kWarpgroup>(
          stage.values, place.rows(dout, p.dout, index, values - place.block_column, p.chunk.aligned), place.thread);
    });
  } else if (place.role == Role::carry) {
    take_registers<Team::kCarryRegisters>();
    StateColumns<kKeys> gradient;
    gradient.load(p.dfinal_state, p.dfinal_state.offset(place.sequence_number, place.head), keys, values,
                  place.column());
    for (int64_t step = 0; step < place.chunks; ++step) {
      const int stage_number = static_cast<int>(step % Memory::kStages);
      const Stage stage(memory, stage_number);
      meet_at(Team::full(stage_number), Team::kAll);
      wait_for_bytes(*stage.barrier, step / Memory::kStages);

      Accumulator du[kTokens / 8];  // the gradient of u
      {
        Fragment s[kKeys / 16];
        gradient.template round<T>(s);
        begin_products();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          multiply_by_rows<kTokens / 8>(du, InRegisters{s}, k, stage.keys, 0, k * 16, k == 0);
        }
        commit_products();
        meet_at(Team::state_taken(place.group), Team::kPair);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) passed.state.store_rows_first(s[k], place.warp * 16, k * 16);
        arrive_at(Team::state_ready(place.group), Team::kPair);
        gradient.scale(chunk_decay(stage.factors));
        wait_for_products<0>();
        keep(du);
      }
      Fragment x[kTokens / 16], dout[kTokens / 16];
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        stage.values.template load_columns_first<true>(dout[k], k * 16, place.tile_column());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 query_in = factor_pair(stage.factors, kQueryIn, 2 * k + i / 2);
          float low, high;
          unpack_pair<T>(dout[k][i], low, high);
          x[k][i] = pack_pair<T>(low * query_in.x, high * query_in.y);
        }
      }
      scale_tokens(du, stage.factors, kKeyOut);
      begin_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply_by_columns<kTokens / 8>(du, InRegisters{dout}, k, stage.scores, k * 16, 0);
      }
      commit_products();
      gradient.template start_adding<T>(x, stage.queries);
      commit_products();
      wait_for_products<1>();
      keep(du);
      round_plain<T>(dout, du);  // in the place of do, which is used up
      Accumulator w[kTokens / 8];
      begin_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply_by_columns<kTokens / 8>(w, InRegisters{dout}, k, stage.inverse, k * 16, 0, k == 0);
      }
      commit_products();
      wait_for_products<0>();
      keep(w);
      keep(gradient.tiles);
      round_scaled<T>(x, w, [&](int tile) {
        const float2 beta = factor_pair(stage.factors, kBeta, tile), key_in = factor_pair(stage.factors, kKeyIn, tile);
        return make_float2(-beta.x * key_in.x, -beta.y * key_in.y);
      });
      begin_products();
      gradient.template start_adding<T>(x, stage.keys);
      commit_products();
      meet_at(Team::values_taken(place.group), Team::kPair);
      round_plain<T>(dout, w);
      store_rows(passed.values, place.warp, dout);
      round_scaled<T>(dout, w, [&](int tile) { return factor_pair(stage.factors, kBeta, tile); });
      store_columns(passed.more, place.warp * 16, dout);
      arrive_at(Team::values_ready(place.group), Team::kPair);
      wait_for_products<0>();
      keep(gradient.tiles);
      if (step + Memory::kStages < place.chunks) arrive_at(Team::empty(stage_number), Team::kAll);
    }
    if (p.dinitial_state.data) {
      gradient.store(p.dinitial_state, p.dinitial_state.offset(place.sequence_number, place.head), keys, values,
                     place.column());
    }
  } else {
    if constexpr (kGroups == 2) leave_registers<Team::kPassOnRegisters>();
    for (int64_t step = 0; step < place.chunks; ++step) {
      const int stage_number = static_cast<int>(step % Memory::kStages);
      const Chunk chunk = place.chunk(last - step);
      if (step == 0) {
        arrive_at(Team::state_taken(place.group), Team::kPair);
        arrive_at(Team::values_taken(place.group), Team::kPair);
      }
      const bool more = step + 1 < place.chunks;
      meet_at(Team::full(stage_number), Team::kAll);
      if (step + Memory::kStages < place.chunks) arrive_at(Team::empty(stage_number), Team::kAll);
      meet_at(Team::state_ready(place.group), Team::kPair);
      const int column = place.block_column + place.group_column;
      const int64_t unit = place.unit(in, last - step);
      store_image<typename Memory::Rows>(p.dstates, unit, passed.state.base, in, column, place.thread);
      if (more) arrive_at(Team::state_taken(place.group), Team::kPair);
      meet_at(Team::values_ready(place.group), Team::kPair);
      store_image<typename Memory::Matrix>(p.w, unit, passed.values.base, in, column, place.thread);
      store_tokens(p.dv.data, passed.more, in, chunk, place.head, column, place.thread);
      if (more) arrive_at(Team::values_taken(place.group), Team::kPair);
    }
  }
}

}  // namespace inlay::gdn::cuda
