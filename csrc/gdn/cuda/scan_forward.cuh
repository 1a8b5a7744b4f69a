// The walk over a head's chunks, for the outputs or, in the backward, for the states: see chunk.cuh for the formulas.
#pragma once

#include "gdn/cuda/scan.cuh"

namespace inlay::gdn::cuda {

struct ScanParams {
  ChunkParams chunk;
  StateTensor final_state;  // or not wanted
  OutputTensor o;           // [B, T, Hv, V] T; for the states: BackwardScratch::u
  void* states;             // BackwardScratch::states
  TokenRows v_rows, o_rows;
};

enum class Scan { outputs, states };

template <typename T, int kKeys, int kGroups, Scan kScan>
using ScanForwardMemory = ScanMemory<T, kKeys, kGroups, kScan == Scan::outputs, kScan == Scan::outputs>;

template <typename T, int kKeys, int kGroups, Scan kScan>
__global__ void __launch_bounds__(ScanTeam<kGroups>::kThreads, 1) scan_kernel(const __grid_constant__ ScanParams p) {
  using Team = ScanTeam<kGroups>;
  using Memory = ScanForwardMemory<T, kKeys, kGroups, kScan>;
  using Stage = ScanStage<Memory, T, kKeys>;
  constexpr bool kOutputs = kScan == Scan::outputs;
  // Registers to keep the rounded state for longer, so that it is handed over while a short product is under way.
  constexpr bool kRoomy = kGroups == 1;
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  wait_for_predecessor();
  release_successor();
  const ScanPlace<kGroups> place(in);
  char* const memory = dynamic_shared();
  const ScanPassed<Memory, T, kKeys> passed(memory, place.group);
  auto& barriers = init_barriers<Memory, kGroups>(memory, kOutputs ? 2 : 1);
  Turn<Memory::kStages> turn;

  if (place.role == Role::fetch) {
    leave_registers<Team::kFetchRegisters>();
    fetch_chunks<Memory, T, kKeys>(memory, barriers, place, p.chunk, in.v, p.v_rows, false);
  } else if (place.role == Role::carry) {
    take_registers<Team::kCarryRegisters>();
    StateColumns<kKeys> state;  // of S^T: rows are columns of S
    state.load(in.initial_state, in.initial_state.offset(place.sequence_number, place.head), keys, values,
               place.column());
    Barrier &state_ready = barriers.state_ready[place.group], &state_taken = barriers.state_taken[place.group];
    Barrier &values_ready = barriers.values_ready[place.group], &values_taken = barriers.values_taken[place.group];
    for (int64_t index = 0; index < place.chunks; ++index, turn.next()) {
      const Stage stage(memory, turn.stage);
      wait_at(barriers.full[turn.stage], turn.phase);

      Fragment s[kKeys / 16];
      state.template round<T>(s);
      Accumulator read[kTokens / 8];
      begin_products();
#pragma unroll
      for (int k = 0; k < kKeys / 16; ++k) {
        multiply_by_rows<kTokens / 8>(read, InRegisters{s}, k, stage.keys, 0, k * 16, k == 0);
      }
      commit_products();
      const auto hand_over_state = [&] {
        if (index > 0) wait_at(state_taken, index - 1);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) passed.state.store_rows_first(s[k], place.warp * 16, k * 16);
        arrive_as_warp(state_ready);
      };
      if constexpr (!kRoomy) hand_over_state();
      Fragment x[kTokens / 16];  // first v, then the right side of the system, then u
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        stage.values.template load_columns_first<true>(x[k], k * 16, place.tile_column());
      }
      const FactorPairs<kRoomy> key_in(stage.factors, kKeyIn), beta(stage.factors, kBeta);
      wait_for_products<0>();
      keep(read);
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int tile = 2 * k + i / 2;
          float low, high;
          unpack_pair<T>(x[k][i], low, high);
          x[k][i] = pack_pair<T>(beta(tile).x * (low - key_in(tile).x * read[tile][i % 2 * 2]),
                                 beta(tile).y * (high - key_in(tile).y * read[tile][i % 2 * 2 + 1]));
        }
      }
      Accumulator u[kTokens / 8];
      begin_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply_by_rows<kTokens / 8>(u, InRegisters{x}, k, stage.inverse, 0, k * 16, k == 0);
      }
      commit_products();
      if constexpr (kRoomy) hand_over_state();
      state.scale(chunk_decay(stage.factors));
      const FactorPairs<true> key_out(stage.factors, kKeyOut);
      wait_for_products<0>();
      keep(u);
      Fragment written[kTokens / 16];
      round_scaled<T>(written, u, key_out);
      begin_products();
      state.template start_adding<T>(written, stage.keys);
      commit_products();
      round_plain<T>(x, u);
      if (index > 0) wait_at(values_taken, index - 1);
      store_rows(passed.values, place.warp, x);
      arrive_as_warp(values_ready);
      wait_for_products<0>();
      keep(state.tiles);
      arrive_as_warp(barriers.empty[turn.stage]);
    }
    if (p.final_state.data) {
      state.store(p.final_state, p.final_state.offset(place.sequence_number, place.head), keys, values, place.column());
    }
  } else {
    if constexpr (kGroups == 2) leave_registers<Team::kPassOnRegisters>();
    Barrier &state_ready = barriers.state_ready[place.group], &state_taken = barriers.state_taken[place.group];
    Barrier &values_ready = barriers.values_ready[place.group], &values_taken = barriers.values_taken[place.group];
    const int column = place.block_column + place.group_column;
    if constexpr (kOutputs) {
      Accumulator from_state[kTokens / 8];  // q S
      Turn<Memory::kStages> next;
      // Of a chunk that there is not, the product of whatever lies there, since what is under way must be so always.
      const auto start_from_state = [&](int64_t index) {
        const Stage stage(memory, next.stage);
        if (index < place.chunks) {
          wait_at(barriers.full[next.stage], next.phase);
          wait_at(state_ready, index);
          publish_shared();  // here rather than by who wrote it, which has no time for it
        }
        begin_products();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          multiply_by_rows<kTokens / 8>(from_state, RowsOf<T, kTokens, kKeys>{passed.state}, k, stage.queries, 0,
                                        k * 16, k == 0);
        }
        commit_products();
        next.next();
      };
      if constexpr (kRoomy) start_from_state(0);
      for (int64_t index = 0; index < place.chunks; ++index, turn.next()) {
        const Stage stage(memory, turn.stage);
        if constexpr (!kRoomy) start_from_state(index);
        wait_for_stores();  // of the last chunk's rows
        arrive_as_warp(barriers.rows[place.group]);
        wait_for_products<0>();
        keep(from_state);
        arrive_as_warp(state_taken);
        Accumulator own[kTokens / 8];
        auto& o = *(kRoomy ? &own : &from_state);
#pragma unroll
        for (int tile = 0; tile < kTokens / 8; ++tile) {
          const float2 query_in = factor_pair(stage.factors, kQueryIn, tile);
#pragma unroll
          for (int i = 0; i < 4; ++i) o[tile][i] = from_state[tile][i] * (i % 2 ? query_in.y : query_in.x);
        }
        wait_at(values_ready, index);
        publish_shared();
        begin_products();
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
          multiply_by_rows<kTokens / 8>(o, RowsOf<T, kTokens, kTokens>{passed.values}, k, stage.scores, 0, k * 16);
        }
        commit_products();
        wait_for_products<0>();
        keep(o);
        arrive_as_warp(values_taken);
        arrive_as_warp(barriers.empty[turn.stage]);
        // Under way while this chunk's rows are written.
        if constexpr (kRoomy) start_from_state(index + 1);
        Fragment x[kTokens / 16];
        round_plain<T>(x, o);
        wait_at(barriers.rows[place.group], 2 * index);
        store_columns(passed.rows, place.warp * 16, x);
        arrive_as_warp(barriers.rows[place.group]);
        wait_at(barriers.rows[place.group], 2 * index + 1);
        publish_shared();
        store_tokens(p.o.data, p.o_rows, p.chunk, passed.rows, place.chunk(index), place.head, column, place.thread);
      }
      wait_for_products<0>();
    } else {
      for (int64_t index = 0; index < place.chunks; ++index) {
        const int64_t unit = place.unit(in, index);
        wait_at(state_ready, index);
        publish_shared();
        store_image<typename Memory::Rows>(p.states, unit, passed.state.base, in, column, place.thread);
        wait_for_stores();
        arrive_as_warp(state_taken);
        wait_at(values_ready, index);
        publish_shared();
        store_image<typename Memory::Matrix>(p.o.data, unit, passed.values.base, in, column, place.thread);
        wait_for_stores();
        arrive_as_warp(values_taken);
      }
    }
    wait_for_stores();
  }
}

}  // namespace inlay::gdn::cuda
