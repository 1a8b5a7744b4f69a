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
  TokenRows dout_rows, dv_rows;
};

template <typename T, int kKeys, int kGroups>
using ScanBackwardMemory = ScanMemory<T, kKeys, kGroups, true, true>;

template <typename T, int kKeys, int kGroups>
__global__ void __launch_bounds__(ScanTeam<kGroups>::kThreads, 1)
    scan_backward_kernel(const __grid_constant__ ScanBackwardParams p) {
  using Team = ScanTeam<kGroups>;
  using Memory = ScanBackwardMemory<T, kKeys, kGroups>;
  using Stage = ScanStage<Memory, T, kKeys>;  // with do in place of v
  // As in scan_kernel.
  constexpr bool kRoomy = kGroups == 1;
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  wait_for_predecessor();
  release_successor();
  const ScanPlace<kGroups> place(in);
  char* const memory = dynamic_shared();
  const ScanPassed<Memory, T, kKeys> passed(memory, place.group);
  const int64_t last = place.chunks - 1;
  auto& barriers = init_barriers<Memory, kGroups>(memory, 1);
  Turn<Memory::kStages> turn;

  if (place.role == Role::fetch) {
    leave_registers<Team::kFetchRegisters>();
    fetch_chunks<Memory, T, kKeys>(memory, barriers, place, p.chunk, p.dout, p.dout_rows, true);
  } else if (place.role == Role::carry) {
    take_registers<Team::kCarryRegisters>();
    StateColumns<kKeys> gradient;
    gradient.load(p.dfinal_state, p.dfinal_state.offset(place.sequence_number, place.head), keys, values,
                  place.column());
    Barrier &state_ready = barriers.state_ready[place.group], &state_taken = barriers.state_taken[place.group];
    Barrier &values_ready = barriers.values_ready[place.group], &values_taken = barriers.values_taken[place.group];
    for (int64_t step = 0; step < place.chunks; ++step, turn.next()) {
      const Stage stage(memory, turn.stage);
      wait_at(barriers.full[turn.stage], turn.phase);

      Fragment s[kKeys / 16], dout[kTokens / 16], x[kTokens / 16];
      const auto load_dout = [&] {
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
          stage.values.template load_columns_first<true>(dout[k], k * 16, place.tile_column());
        }
      };
      const auto scale_dout = [&] {  // to x
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 query_in = factor_pair(stage.factors, kQueryIn, 2 * k + i / 2);
            float low, high;
            unpack_pair<T>(dout[k][i], low, high);
            x[k][i] = pack_pair<T>(low * query_in.x, high * query_in.y);
          }
        }
      };
      if constexpr (kRoomy) load_dout();
      gradient.template round<T>(s);
      const auto start_from_scores = [&](Accumulator(&c)[kTokens / 8], bool fresh) {
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
          multiply_by_columns<kTokens / 8>(c, InRegisters{dout}, k, stage.scores, k * 16, 0, fresh && k == 0);
        }
        commit_products();
      };
      const auto hand_over_state = [&] {
        if (step > 0) wait_at(state_taken, step - 1);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) passed.state.store_rows_first(s[k], place.warp * 16, k * 16);
        arrive_as_warp(state_ready);
      };
      Accumulator du[kTokens / 8], from_scores[kTokens / 8];  // the gradient of u, and the part of it that o's has
      begin_products();
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        multiply_by_rows<kTokens / 8>(du, InRegisters{s}, k, stage.keys, 0, k * 16, k == 0);
      }
      commit_products();
      if constexpr (kRoomy) {
        start_from_scores(from_scores, true);
      } else {
        hand_over_state();
      }
      gradient.scale(chunk_decay(stage.factors));
      if constexpr (kRoomy) scale_dout();
      wait_for_products<0>();
      keep(du);
      scale_tokens(du, stage.factors, kKeyOut);
      if constexpr (kRoomy) {
        keep(from_scores);
#pragma unroll
        for (int tile = 0; tile < kTokens / 8; ++tile) {
#pragma unroll
          for (int i = 0; i < 4; ++i) du[tile][i] += from_scores[tile][i];
        }
      } else {
        load_dout();
        begin_products();
        start_from_scores(du, false);
        scale_dout();
        wait_for_products<0>();
        keep(du);
      }
      round_plain<T>(dout, du);  // in the place of do, which is used up
      Accumulator w[kTokens / 8];
      begin_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply_by_columns<kTokens / 8>(w, InRegisters{dout}, k, stage.inverse, k * 16, 0, k == 0);
      }
      commit_products();
      gradient.template start_adding<T>(x, stage.queries);
      commit_products();
      if constexpr (kRoomy) {
        hand_over_state();
        wait_for_products<1>();
      } else {
        wait_for_products<0>();
        keep(gradient.tiles);
      }
      keep(w);
      Fragment written[kTokens / 16];
      round_scaled<T>(written, w, [&](int tile) {
        const float2 beta = factor_pair(stage.factors, kBeta, tile), key_in = factor_pair(stage.factors, kKeyIn, tile);
        return make_float2(-beta.x * key_in.x, -beta.y * key_in.y);
      });
      begin_products();
      gradient.template start_adding<T>(written, stage.keys);
      commit_products();
      if (step > 0) wait_at(values_taken, step - 1);
      round_plain<T>(dout, w);
      store_rows(passed.values, place.warp, dout);
      round_scaled<T>(dout, w, [&](int tile) { return factor_pair(stage.factors, kBeta, tile); });
      store_columns(passed.rows, place.warp * 16, dout);
      arrive_as_warp(values_ready);
      wait_for_products<0>();
      keep(gradient.tiles);
      arrive_as_warp(barriers.empty[turn.stage]);
    }
    if (p.dinitial_state.data) {
      gradient.store(p.dinitial_state, p.dinitial_state.offset(place.sequence_number, place.head), keys, values,
                     place.column());
    }
  } else {
    if constexpr (kGroups == 2) leave_registers<Team::kPassOnRegisters>();
    Barrier &state_ready = barriers.state_ready[place.group], &state_taken = barriers.state_taken[place.group];
    Barrier &values_ready = barriers.values_ready[place.group], &values_taken = barriers.values_taken[place.group];
    for (int64_t step = 0; step < place.chunks; ++step) {
      const Chunk chunk = place.chunk(last - step);
      wait_at(state_ready, step);
      publish_shared();
      const int column = place.block_column + place.group_column;
      const int64_t unit = place.unit(in, last - step);
      store_image<typename Memory::Rows>(p.dstates, unit, passed.state.base, in, column, place.thread);
      wait_for_stores();
      arrive_as_warp(state_taken);
      wait_at(values_ready, step);
      publish_shared();
      store_image<typename Memory::Matrix>(p.w, unit, passed.values.base, in, column, place.thread);
      store_tokens(p.dv.data, p.dv_rows, p.chunk, passed.rows, chunk, place.head, column, place.thread);
      wait_for_stores();
      arrive_as_warp(values_taken);
    }
  }
}

}  // namespace inlay::gdn::cuda
