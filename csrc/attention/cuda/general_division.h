// How the general kernels' work is divided up, by widths, dtype and the shared memory of the device.
#pragma once

#include <algorithm>

#include "attention/cuda/general_backward.cuh"
#include "attention/cuda/general_forward.cuh"

namespace inlay::attention::cuda {

// The most that a block may have.
inline int shared_memory_limit() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

inline void check_division(const Division& division) {
  if (division.warps == 0) fail("attention: q and v must be narrower on a GPU of so little shared memory");
}

constexpr int kInfoBytes = 64;
static_assert(sizeof(BlockInfo) <= kInfoBytes);

inline Division empty_division(const Inputs& in) {
  Division division;
  division.depth = pieces_of(in.head_dim, size_of(in.q.dtype));
  division.width = pieces_of(in.value_dim, size_of(in.q.dtype));
  while (division.column_groups * kWarpBytes < std::max(division.depth, division.width) * kPieceBytes) {
    division.column_groups *= 2;
  }
  return division;
}

// Of `score_tiles` in each of the warps.
inline int exchange_bytes(const Division& division, int score_tiles) {
  return division.column_groups > 1 ? division.warps * score_tiles * 512 : 0;
}

// The largest tile of keys that fits. Scores are exchanged by way of k's memory. Of no warps: none fits.
template <typename T>
Division forward_division(const Inputs& in, int shared_limit) {
  using C = GeneralForwardConfig<T>;
  Division division = empty_division(in);
  division.warps = C::kWarps;
  division.rows = C::kWarps / division.column_groups * C::kRows;
  division.streamed_at = division.exchange_at = tile_bytes(division.rows, division.depth);
  for (int keys = C::kScoreTiles * 8; keys >= 16; keys /= 2) {
    division.streamed = keys;
    division.stage_bytes =
        std::max(tile_bytes(keys, division.depth), exchange_bytes(division, C::kRowTiles * keys / 8));
    division.info_at = division.streamed_at + division.stage_bytes + tile_bytes(keys, division.width);
    division.shared_bytes = division.info_at + kInfoBytes;
    if (division.shared_bytes <= shared_limit) return division;
  }
  return {};
}

// Of the backward's kernel with this role.
template <typename T, GeneralRole kRole>
Division backward_division(const Inputs& in, int shared_limit) {
  using C = GeneralBackwardConfig<T, kRole>;
  Division division = empty_division(in);
  const auto bytes = [&](int rows) { return tile_bytes(rows, division.depth) + tile_bytes(rows, division.width); };
  for (int warps = C::kWarps; warps >= std::max(4, division.column_groups); warps /= 2) {
    division.warps = warps;
    division.rows = warps / division.column_groups * C::kRows;
    division.streamed_at = bytes(division.rows);
    for (int streamed = C::kScoreTiles * 8; streamed >= 16; streamed /= 2) {
      division.streamed = streamed;
      division.stage_bytes = bytes(streamed) + streamed * static_cast<int>(sizeof(RowValues));
      for (int stages = kRole == GeneralRole::bias ? 1 : 2; stages >= 1; --stages) {
        division.stages = stages;
        division.exchange_at = division.streamed_at + stages * division.stage_bytes;
        division.info_at = division.exchange_at + exchange_bytes(division, 2 * C::kRowTiles * streamed / 8);
        division.shared_bytes = division.info_at + kInfoBytes;
        if (division.shared_bytes <= shared_limit) return division;
      }
    }
  }
  return {};
}

// Where several blocks are to share a multiprocessor, each has its part of the memory if that is enough.
template <typename T, GeneralRole kRole>
Division backward_division(const Inputs& in) {
  constexpr int kReserved = 1 << 10;  // for the system, of each block's
  const int of_block = shared_memory_limit();
  const int blocks = GeneralBackwardConfig<T, kRole>::kBlocks;
  const int part = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / blocks - kReserved;
  const Division division = backward_division<T, kRole>(in, std::min(part, of_block));
  return division.warps > 0 ? division : backward_division<T, kRole>(in, of_block);
}

}  // namespace inlay::attention::cuda
