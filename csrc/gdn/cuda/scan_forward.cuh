// The walk over a head's chunks, for the outputs or, in the backward, for the states: see chunk.cuh for the formulas.
#pragma once

#include "gdn/cuda/scan.cuh"

namespace inlay::gdn::cuda {

struct ScanParams {
  ChunkParams chunk;
  StateTensor final_state;  // or not wanted
  OutputTensor o;           // [B, T, Hv, V] T; for the states: BackwardScratch::u
  void* states;             // BackwardScratch::states
};

enum class Scan { outputs, states };

template <typename T, int kKeys, int kGroups, Scan kScan>
using ScanForwardMemory = ScanMemory<T, kKeys, kGroups, kScan == Scan::outputs, 1>;

// Four 8x8 matrices, of tokens [0, 8) and columns [0, 8), [8, 16), then of tokens [8, 16), to their place in the
// chunk's rows of a dense [B, T, Hv, V], 16 bytes a lane.
template <typename T>
__device__ inline void store_matrices(T* output, Fragment& r, int row, const Inputs& in, const Chunk& chunk,
                                      int64_t head, int column) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, token = row + t / 2 * 8 + g;
  transpose_quad(r);
  column += t % 2 * 8;
  if (token < chunk.tokens && column < in.value_dim) {
    const int64_t at = (chunk.batch * in.sequences.tokens + chunk.token + token) * in.value_heads + head;
    *reinterpret_cast<uint4*>(output + at * in.value_dim + column) = uint4{r[0], r[1], r[2], r[3]};
  }
}

template <typename T, int kKeys, int kGroups, Scan kScan>
__global__ void __launch_bounds__(ScanTeam<kGroups>::kThreads, 1) scan_kernel(const __grid_constant__ ScanParams p) {
  using Team = ScanTeam<kGroups>;
  using Memory = ScanForwardMemory<T, kKeys, kGroups, kScan>;
  using Stage = ScanStage<Memory, T, kKeys>;
  constexpr bool kOutputs = kScan == Scan::outputs;
  const Inputs& in = p.chunk.inputs;
  const int keys = static_cast<int>(in.key_dim), values = static_cast<int>(in.value_dim);
  wait_for_predecessor();
  release_successor();
  const ScanPlace<kGroups> place(in);
  char* const memory = dynamic_shared();
  const ScanPassed<Memory, T, kKeys> passed(memory, place.group);

  init_stages<Stage, Memory::kStages>(memory);
  if (place.role == Role::fetch) {
    leave_registers<Team::kFetchRegisters>();
    const T* const v = place.template first_row<T>(in.v, place.head, place.block_column);
    fetch_all<Team, Memory::kStages>(place.chunks, [&](int64_t index, int stage_number) {
      const Stage stage(memory, stage_number);
      fetch_prepared(stage, p.chunk.prepared, place.key_unit(in, index), place.unit(in, index), place.thread);
      fetch_tile<kWarpgroup>(stage.values, place.rows(v, in.v, index, values - place.block_column, p.chunk.aligned),
                             place.thread);
    });
  } else if (place.role == Role::carry) {
    take_registers<Team::kCarryRegisters>();
    StateColumns<kKeys> state;  // of S^T: rows are columns of S
    state.load(in.initial_state, in.initial_state.offset(place.sequence_number, place.head), keys, values,
               place.column());
    for (int64_t index = 0; index < place.chunks; ++index) {
      const int stage_number = static_cast<int>(index % Memory::kStages);
      const Stage stage(memory, stage_number);
      meet_at(Team::full(stage_number), Team::kAll);
      wait_for_bytes(*stage.barrier, index / Memory::kStages);

      Accumulator read[kTokens / 8];
      {
        Fragment s[kKeys / 16];
        state.template round<T>(s);
        begin_products();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          multiply_by_rows<kTokens / 8>(read, InRegisters{s}, k, stage.keys, 0, k * 16, k == 0);
        }
        commit_products();
        meet_at(Team::state_taken(place.group), Team::kPair);
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) passed.state.store_rows_first(s[k], place.warp * 16, k * 16);
        publish_shared();
        arrive_at(Team::state_ready(place.group), Team::kPair);
        wait_for_products<0>();
        keep(read);
      }
      Fragment x[kTokens / 16];  // first the right side of the system, then u
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        Fragment v;
        stage.values.template load_columns_first<true>(v, k * 16, place.tile_column());
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int tile = 2 * k + i / 2;
          const float2 key_in = factor_pair(stage.factors, kKeyIn, tile);
          const float2 beta = factor_pair(stage.factors, kBeta, tile);
          float low, high;
          unpack_pair<T>(v[i], low, high);
          x[k][i] = pack_pair<T>(beta.x * (low - key_in.x * read[tile][i % 2 * 2]),
                                 beta.y * (high - key_in.y * read[tile][i % 2 * 2 + 1]));
        }
      }
      Accumulator u[kTokens / 8];
      begin_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        multiply_by_rows<kTokens / 8>(u, InRegisters{x}, k, stage.inverse, 0, k * 16, k == 0);
      }
      commit_products();
      state.scale(chunk_decay(stage.factors));
      wait_for_products<0>();
      keep(u);
      Fragment written[kTokens / 16];
      round_scaled<T>(written, u, [&](int tile) { return factor_pair(stage.factors, kKeyOut, tile); });
      begin_products();
      state.template start_adding<T>(written, stage.keys);
      commit_products();
      round_plain<T>(x, u);
      meet_at(Team::values_taken(place.group), Team::kPair);
      store_rows(passed.values, place.warp, x);
      publish_shared();
      arrive_at(Team::values_ready(place.group), Team::kPair);
      wait_for_products<0>();
      keep(state.tiles);
      if (index + Memory::kStages < place.chunks) arrive_at(Team::empty(stage_number), Team::kAll);
    }
    if (p.final_state.data) {
      state.store(p.final_state, p.final_state.offset(place.sequence_number, place.head), keys, values, place.column());
    }
  } else {
    if constexpr (kGroups == 2) leave_registers<Team::kPassOnRegisters>();
    for (int64_t index = 0; index < place.chunks; ++index) {
      const int stage_number = static_cast<int>(index % Memory::kStages);
      const Stage stage(memory, stage_number);
      const Chunk chunk = place.chunk(index);
      if (index == 0) {
        arrive_at(Team::state_taken(place.group), Team::kPair);
        arrive_at(Team::values_taken(place.group), Team::kPair);
      }
      const bool more = index + 1 < place.chunks;
      meet_at(Team::full(stage_number), Team::kAll);
      wait_for_bytes(*stage.barrier, index / Memory::kStages);
      meet_at(Team::state_ready(place.group), Team::kPair);
      if constexpr (kOutputs) {
        Accumulator o[kTokens / 8];
        begin_products();
#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
          multiply_by_rows<kTokens / 8>(o, RowsOf<T, kTokens, kKeys>{passed.state}, k, stage.queries, 0, k * 16,
                                        k == 0);
        }
        commit_products();
        wait_for_products<0>();
        keep(o);
        if (more) arrive_at(Team::state_taken(place.group), Team::kPair);
        scale_tokens(o, stage.factors, kQueryIn);
        meet_at(Team::values_ready(place.group), Team::kPair);
        begin_products();
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
          multiply_by_rows<kTokens / 8>(o, RowsOf<T, kTokens, kTokens>{passed.values}, k, stage.scores, 0, k * 16);
        }
        commit_products();
        wait_for_products<0>();
        keep(o);
        if (more) arrive_at(Team::values_taken(place.group), Team::kPair);
        if (index + Memory::kStages < place.chunks) arrive_at(Team::empty(stage_number), Team::kAll);
        // From registers: through shared memory it takes fewer instructions, and a fifth longer.
        Fragment x[kTokens / 16];
        round_plain<T>(x, o);
#pragma unroll
        for (int k = 0; k < kTokens / 16; ++k) {
#pragma unroll
          for (int i = 0; i < 4; ++i) x[k][i] = transpose_matrix(x[k][i]);
          store_matrices(static_cast<T*>(p.o.data), x[k], k * 16, in, chunk, place.head, place.column());
        }
      } else {
        if (index + Memory::kStages < place.chunks) arrive_at(Team::empty(stage_number), Team::kAll);
        const int column = place.block_column + place.group_column;
        const int64_t unit = place.unit(in, index);
        store_image<typename Memory::Rows>(p.states, unit, passed.state.base, in, column, place.thread);
        if (more) arrive_at(Team::state_taken(place.group), Team::kPair);
        meet_at(Team::values_ready(place.group), Team::kPair);
        store_image<typename Memory::Matrix>(p.o.data, unit, passed.values.base, in, column, place.thread);
        if (more) arrive_at(Team::values_taken(place.group), Team::kPair);
      }
    }
  }
}

}  // namespace inlay::gdn::cuda
