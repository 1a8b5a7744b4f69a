// Which tile is whose turn, and what a tile is.
#pragma once

#include "attention/params.h"
#include "common/cuda/launch.cuh"

namespace inlay::attention::cuda {

// A tile as its block's warps need to know it. Blocks are tiles of keys, numbered from the sequence's first key.
struct TileInfo {
  int batch;
  int head, key_head;
  int first_query, query_count;          // of the sequence; a count of zero: nothing is left
  int query_row, key_row;                // the first query's token, and the token of the sequence's first key
  int key_count, diagonal;               // the sequence's visible keys, and how many more keys than queries it has
  int first_block, end_block;            // some query sees a key
  int first_full_block, end_full_block;  // every query sees every key
  int clear_from;  // rows of the last block from here on lie outside of the sequence but inside of the tensor; 0: none
};

// Tiles are numbered by group of heads, then by place in the sequence, the last ones first, then by head of the group.
// Causal tiles come in the order of their length, and keys and values of a group stay in the L2 cache meanwhile.
struct TileOrder {
  uint32_t count = 0;       // less than 2^31
  uint32_t places = 0;      // tiles of one head, or, with packed sequences, a bound
  uint32_t heads = 0;       // of all batch rows
  uint32_t head_group = 0;  // heads of a group of these
  uint32_t group = 1;       // heads of q to one of k and v
  unsigned* taken =
      nullptr;  // tiles that were taken after the first one of each block; null: every so many-th is one's own
};

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t next_tile(const TileOrder& order, uint32_t number) {
  if (!order.taken) return number + gridDim.x;
  unsigned taken = 0;
  if (threadIdx.x % 32 == 0) taken = atomicAdd(order.taken, 1u);
  return __shfl_sync(0xffffffffu, taken, 0) + gridDim.x;
}

// The last sequence whose first tile has this number or a lower one.
template <int kQueries>
__device__ int64_t sequence_at(const Sequences& sequences, int64_t place) {
  int64_t low = 0, high = sequences.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (sequences.first_chunk(middle, kQueries) <= place) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// By a whole warp. Of the result, query_count is zero where the number is nobody's.
template <int kQueries, int kKeys>
__device__ TileInfo describe_tile(const Inputs& in, const TileOrder& order, uint32_t number) {
  const uint32_t of_group = order.places * order.head_group;
  const uint32_t first_head = number / of_group * order.head_group;
  const uint32_t heads = min(order.head_group, order.heads - first_head);
  const uint32_t rest = number % of_group;
  const uint32_t place = order.places - 1 - rest / heads;
  const uint32_t head = first_head + rest % heads;

  const uint32_t query_heads = static_cast<uint32_t>(in.query_heads);
  const bool packed = in.queries.offsets != nullptr;
  const int64_t sequence = packed ? sequence_at<kQueries>(in.queries, place) : head / query_heads;
  const Sequence queries = in.queries[sequence], keys = in.keys[sequence];
  const int64_t first = (packed ? place - in.queries.first_chunk(sequence, kQueries) : place) * kQueries;
  const int64_t key_count = in.key_count(sequence, keys);

  TileInfo info{};
  info.batch = static_cast<int>(queries.batch);
  info.head = static_cast<int>(packed ? head : head % query_heads);
  info.key_head = info.head / static_cast<int>(order.group);
  info.first_query = static_cast<int>(first);
  info.query_count = static_cast<int>(max(int64_t{0}, min(int64_t{kQueries}, queries.end - queries.begin - first)));
  info.query_row = static_cast<int>(queries.begin + first);
  info.key_row = static_cast<int>(keys.begin);
  info.key_count = static_cast<int>(key_count);
  info.diagonal = static_cast<int>((keys.end - keys.begin) - (queries.end - queries.begin));

  constexpr int kFar = 0x7fffffff;
  int lowest = kFar, highest = 0, all_from = 0, all_to = kFar;
  // Without key ranges both limits grow with the query: the first and the last query say all, even where they see
  // nothing themselves.
  const int lane = threadIdx.x % 32, step = in.key_ranges.data ? 1 : max(info.query_count - 1, 1);
  for (int i = lane * step; i < info.query_count; i += 32 * step) {
    const KeyRange seen = in.visible(first + i, key_count, info.diagonal, info.batch, info.query_row + i);
    const int begin = static_cast<int>(seen.begin), end = static_cast<int>(seen.end);
    if (!in.key_ranges.data || !seen.empty()) {
      lowest = min(lowest, begin);
      highest = max(highest, end);
    }
    all_from = max(all_from, begin);
    all_to = min(all_to, end);
  }
  lowest = __reduce_min_sync(0xffffffffu, lowest);
  highest = __reduce_max_sync(0xffffffffu, highest);
  all_from = __reduce_max_sync(0xffffffffu, all_from);
  all_to = __reduce_min_sync(0xffffffffu, all_to);
  highest = min(highest, info.key_count);
  if (lowest < highest) {
    info.first_block = lowest / kKeys;
    info.end_block = (highest + kKeys - 1) / kKeys;
    info.first_full_block = (all_from + kKeys - 1) / kKeys;
    info.end_full_block = all_to / kKeys;
    const int last_rows = info.key_count - (info.end_block - 1) * kKeys;
    if (last_rows < kKeys && info.key_row + info.key_count < in.keys.tokens) info.clear_from = last_rows;
  }
  return info;
}

#endif

}  // namespace inlay::attention::cuda
