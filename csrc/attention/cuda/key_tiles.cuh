// Which tile of keys is whose turn in the backward, and what it is.
#pragma once

#include "attention/cuda/tiles.cuh"

namespace inlay::attention::cuda {

// A tile of keys as its block's warps need to know it. Tiles of queries are numbered from the sequence's first query.
struct KeyTileInfo {
  int batch;
  int key_head;
  int first_key, row_count;  // of the sequence; rows that it has of the tile, those without a visible key too
  int key_row, query_row;    // tokens of the tile's first key, and of the sequence's first query
  int query_count;           // of the sequence
  int key_count, diagonal;   // the sequence's visible keys, and how many more keys than queries it has
  int first_tile, end_tile;  // tiles of queries, some of which may see a key
  int first_query_tile;      // what the sequence's first one counts among all of its head
  int clear_from;            // rows from here on are not to be counted, and may hold anything
};

// Tiles of keys are numbered by group of heads, then by place in the sequence, then by head of the group: of causal
// attention the first tiles take longest. Queries of a group stay in the L2 cache meanwhile.
struct KeyTileOrder {
  uint32_t count = 0;       // less than 2^31
  uint32_t places = 0;      // tiles of one head, or, with packed sequences, a bound
  uint32_t heads = 0;       // of keys, of all batch rows
  uint32_t head_group = 0;  // heads of a group of these
  bool last_first = false;  // places come in the opposite order
};

#ifdef __CUDACC__

// By each thread for itself. Of the result, row_count is zero where the number is nobody's.
template <int kQueries, int kKeys>
__device__ inline KeyTileInfo describe_key_tile(const Inputs& in, const KeyTileOrder& order, uint32_t number) {
  const uint32_t of_group = order.places * order.head_group;
  const uint32_t first_head = number / of_group * order.head_group;
  const uint32_t heads = min(order.head_group, order.heads - first_head);
  const uint32_t rest = number % of_group;
  const uint32_t place = order.last_first ? order.places - 1 - rest / heads : rest / heads;
  const uint32_t head = first_head + rest % heads;

  const uint32_t key_heads = static_cast<uint32_t>(in.key_heads);
  const bool packed = in.keys.offsets != nullptr;
  const int64_t sequence = packed ? sequence_at<kKeys>(in.keys, place) : head / key_heads;
  const Sequence queries = in.queries[sequence], keys = in.keys[sequence];
  const int64_t first = (packed ? place - in.keys.first_chunk(sequence, kKeys) : place) * kKeys;

  KeyTileInfo info{};
  info.batch = static_cast<int>(keys.batch);
  info.key_head = static_cast<int>(packed ? head : head % key_heads);
  info.first_key = static_cast<int>(first);
  info.row_count = static_cast<int>(max(int64_t{0}, min(int64_t{kKeys}, keys.end - keys.begin - first)));
  info.key_row = static_cast<int>(keys.begin + first);
  info.query_row = static_cast<int>(queries.begin);
  info.query_count = static_cast<int>(queries.end - queries.begin);
  info.key_count = static_cast<int>(in.key_count(sequence, keys));
  info.diagonal = static_cast<int>((keys.end - keys.begin) - (queries.end - queries.begin));
  info.first_query_tile = static_cast<int>(packed ? in.queries.first_chunk(sequence, kQueries) : 0);

  const int64_t last = min(first + kKeys, int64_t{info.key_count}) - 1;  // of the keys that may be seen
  int64_t begin = 0, end = info.query_count;
  if (in.window_right >= 0) begin = max(begin, first - info.diagonal - in.window_right);
  if (in.window_left >= 0) end = min(end, last + in.window_left - info.diagonal + 1);
  if (info.row_count > 0 && last >= first && begin < end) {
    info.first_tile = static_cast<int>(begin / kQueries);
    info.end_tile = static_cast<int>((end + kQueries - 1) / kQueries);
    const int rows = static_cast<int>(last - first + 1);
    info.clear_from = rows < kKeys && info.key_row + rows < in.keys.tokens ? rows : kKeys;
  }
  return info;
}

#endif

}  // namespace inlay::attention::cuda
