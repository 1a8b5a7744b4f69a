// What a mask says of whole tiles of scores: which of them need not be computed, and which need not read it.
#pragma once

#include "attention/cuda/general_scores.cuh"

namespace inlay::attention::cuda {

// Bits of a tile's cells put together.
constexpr uint32_t kCellsSeen = 0x01010101u, kCellsHidden = 0x02020202u;

struct QueryTile {
  int batch, head;
  int first, count;  // a multiple of kCell
};

// Of a tile of scores. Its keys begin at a multiple of their number, which is a power of 2 from kCell on.
__device__ __forceinline__ uint32_t cells_of(const MaskCells& cells, const QueryTile& queries, int first_key,
                                             int keys) {
  const uint32_t* const own = cells.words + (queries.batch * cells.batch_stride + queries.head * cells.head_stride);
  const int first_word = first_key / kWordKeys, last_query = cells.queries - 1, last_word = cells.row_words - 1;
  uint32_t bits = 0;
  for (int row = 0; row < queries.count; row += kCell) {
    const uint32_t* const of_row = own + min((queries.first + row) / kCell, last_query) * cells.query_stride;
    for (int key = 0; key < keys; key += kWordKeys) {
      bits |= of_row[min(first_word + key / kWordKeys, last_word) * cells.key_stride];
    }
  }
  if (keys < kWordKeys) bits = bits >> first_key % kWordKeys / kCell * 8 & ((1u << keys / kCell * 8) - 1);
  return bits;
}

// A tile of keys, and whether the mask hides some of it.
struct SeenTile {
  int number;
  bool masked;
};

// The first from `tile` on of which the queries see something; `end` or more where there is none. By a whole warp.
__device__ __forceinline__ SeenTile first_seen_tile(const MaskCells& cells, const ScoreTensor& mask,
                                                    const QueryTile& queries, int tile, int end, int keys) {
  if (!cells.words) return {tile, mask.data != nullptr};
#pragma unroll 1
  for (; tile < end; tile += 32) {
    const int own = tile + static_cast<int>(threadIdx.x % 32);
    const uint32_t bits = own < end ? cells_of(cells, queries, own * keys, keys) : 0;
    const unsigned seen = __ballot_sync(kAllLanes, (bits & kCellsSeen) != 0);
    const unsigned hidden = __ballot_sync(kAllLanes, (bits & kCellsHidden) != 0);
    if (seen == 0) continue;
    const int lane = __ffs(seen) - 1;
    return {tile + lane, (hidden >> lane & 1) != 0};
  }
  return {end, false};
}

}  // namespace inlay::attention::cuda
