// Which tiles of scores a block of the general backward passes over.
#pragma once

#include "attention/cuda/general_cells.cuh"

namespace inlay::attention::cuda {

// What a block has: a tile of keys, whose dk and dv it adds up over queries and the heads that share the keys; a tile
// of queries of one head, whose dq it adds up over keys; or a tile of a bias's gradient, added up over what the bias is
// broadcast along.
enum class GeneralRole { keys, queries, bias };

struct GeneralBackwardArguments {
  BackwardParams params;
  Division division;
  ScoreRule rule;
  TokenTensor dout;  // the gradient of o
  const RowValues* rows;
  const QueryTileRange* ranges;  // of tiles of the division's queries, where keys have the blocks
  MaskCells cells;
};

// A tile of scores, for the warps of a block alike. Not every query sees every key of it where it is `partial`, as far
// as positions say, and where it is `masked`.
struct Visit {
  int head;
  int first_query, first_key;  // of the sequence
  bool masked, partial;
};

template <GeneralRole kRole>
class Visits;

template <>
class Visits<GeneralRole::keys> {
 public:
  __device__ __forceinline__ explicit Visits(const GeneralBackwardArguments& arguments)
      : in_(arguments.params.inputs),
        rows_(arguments.division.rows),
        streamed_(arguments.division.streamed),
        cells_(arguments.cells),
        place_(locate(in_.keys, rows_, blockIdx.x % tiles())),
        at(block_info(arguments.division).at) {
    key_head = static_cast<int>(blockIdx.x / tiles());
    set_block_info(block_info(arguments.division), in_, place_, key_head, rows_, false);
    visit.first_key = place_.first;
    visit.head = key_head * static_cast<int>(in_.group());
    end_head_ = visit.head + static_cast<int>(in_.group());
    if (visit.first_key >= at.key_count) end_head_ = 0;
    query_tiles_ = (at.query_count + streamed_ - 1) / streamed_;
    ranges_ = arguments.ranges + in_.queries.first_chunk(place_.sequence, streamed_);
  }

  __device__ __forceinline__ bool next() {
    const int end_key = min(visit.first_key + rows_, at.key_count);
    for (; visit.head < end_head_; ++visit.head, tile_ = -1) {
      for (; tile_ + 1 < query_tiles_; tile_ += 32) {
        const int own = tile_ + 1 + static_cast<int>(threadIdx.x % 32);
        QueryTileRange range{0, 0, 0, 0};
        if (own < query_tiles_) range = ranges_[own];
        bool seen = range.lowest < end_key && range.highest > visit.first_key;
        bool masked = in_.mask.data != nullptr;
        if (cells_.words && seen) {
          const uint32_t bits =
              cells_of(cells_, {at.batch, visit.head, own * streamed_, streamed_}, visit.first_key, rows_);
          seen = (bits & kCellsSeen) != 0;
          masked = (bits & kCellsHidden) != 0;
        }
        const unsigned some = __ballot_sync(kAllLanes, seen);
        if (some == 0) continue;
        const bool partial = range.all_from > visit.first_key || range.all_to < visit.first_key + rows_ ||
                             (own + 1) * streamed_ > at.query_count;
        const int lane = __ffs(some) - 1;
        tile_ += 1 + lane;
        visit.partial = (__ballot_sync(kAllLanes, partial) >> lane & 1) != 0;
        visit.masked = (__ballot_sync(kAllLanes, masked) >> lane & 1) != 0;
        visit.first_query = tile_ * streamed_;
        return true;
      }
    }
    return false;
  }

 private:
  __device__ __forceinline__ uint32_t tiles() const { return static_cast<uint32_t>(in_.keys.chunk_bound(rows_)); }

  const Inputs& in_;
  int rows_, streamed_;
  const MaskCells& cells_;
  RowPlace place_;
  const QueryTileRange* ranges_;
  int query_tiles_, end_head_;
  int tile_ = -1;

 public:
  const SequenceInfo& at;
  int key_head;
  Visit visit;
};

template <>
class Visits<GeneralRole::queries> {
 public:
  __device__ __forceinline__ explicit Visits(const GeneralBackwardArguments& arguments)
      : in_(arguments.params.inputs),
        rows_(arguments.division.rows),
        streamed_(arguments.division.streamed),
        cells_(arguments.cells),
        place_(locate(in_.queries, rows_, tiles() - 1 - blockIdx.x % tiles())),
        range_(block_info(arguments.division).range),
        at(block_info(arguments.division).at) {
    visit.head = static_cast<int>(blockIdx.x / tiles());
    set_block_info(block_info(arguments.division), in_, place_, visit.head, rows_, true);
    visit.first_query = place_.first;
    visit.first_key = range_.lowest / streamed_ * streamed_ - streamed_;
  }

  __device__ __forceinline__ bool next() {
    const SeenTile tile =
        first_seen_tile(cells_, in_.mask, {at.batch, visit.head, visit.first_query, rows_},
                        visit.first_key / streamed_ + 1, (range_.highest + streamed_ - 1) / streamed_, streamed_);
    visit.first_key = tile.number * streamed_;
    visit.masked = tile.masked;
    visit.partial = visit.first_key < range_.all_from || visit.first_key + streamed_ > range_.all_to;
    return visit.first_key < range_.highest;
  }

 private:
  __device__ __forceinline__ uint32_t tiles() const { return static_cast<uint32_t>(in_.queries.chunk_bound(rows_)); }

  const Inputs& in_;
  int rows_, streamed_;
  const MaskCells& cells_;
  RowPlace place_;
  const QueryTileRange& range_;

 public:
  const SequenceInfo& at;
  Visit visit;
};

template <>
class Visits<GeneralRole::bias> {
 public:
  __device__ __forceinline__ explicit Visits(const GeneralBackwardArguments& arguments)
      : in_(arguments.params.inputs),
        rows_(arguments.division.rows),
        streamed_(arguments.division.streamed),
        cells_(arguments.cells),
        sizes_(arguments.params.dbias.sizes),
        at(in_, 0) {
    // The block's place in the gradient, and how much is added up for it.
    uint32_t rest = blockIdx.x;
    const auto take = [&](int i, int64_t whole, int tile) {
      const uint32_t all = static_cast<uint32_t>((whole + tile - 1) / tile);
      begin[i] = end[i] = 0;
      if (sizes_[i] == 1) {
        end[i] = static_cast<int>(whole);
      } else {
        begin[i] = static_cast<int>(rest % all) * tile;
        end[i] = static_cast<int>(min(whole, int64_t{begin[i]} + tile));
        rest /= all;
      }
    };
    take(3, in_.keys.tokens, streamed_);
    take(2, in_.queries.tokens, rows_);
    take(1, in_.query_heads, 1);
    take(0, in_.batch, 1);
    batch_ = begin[0];
    visit.head = begin[1];
    visit.first_query = begin[2];
    visit.first_key = begin[3] - streamed_;
    moved_ = true;
  }

  __device__ __forceinline__ bool next() {
    for (;;) {
      visit.first_key += streamed_;
      if (visit.first_key >= end[3]) {
        visit.first_key = begin[3];
        visit.first_query += rows_;
        moved_ = true;
      }
      if (visit.first_query >= end[2]) {
        visit.first_query = begin[2];
        ++visit.head;
      }
      if (visit.head >= end[1]) {
        visit.head = begin[1];
        ++batch_;
      }
      if (batch_ >= end[0] || begin[1] >= end[1] || begin[2] >= end[2] || begin[3] >= end[3]) return false;
      if (moved_) {
        at = SequenceInfo(in_, batch_);
        range_ = range_of(in_, at, visit.first_query, min(rows_, at.query_count - visit.first_query));
        moved_ = false;
      }
      visit.partial = visit.first_key < range_.all_from || visit.first_key + streamed_ > range_.all_to;
      visit.masked = in_.mask.data != nullptr;
      if (visit.first_key >= range_.highest || visit.first_key + streamed_ <= range_.lowest) continue;
      if (!cells_.words) return true;
      const uint32_t bits =
          cells_of(cells_, {at.batch, visit.head, visit.first_query, rows_}, visit.first_key, streamed_);
      visit.masked = (bits & kCellsHidden) != 0;
      if (bits & kCellsSeen) return true;
    }
  }

 private:
  const Inputs& in_;
  int rows_, streamed_;
  const MaskCells& cells_;
  const int64_t* sizes_;
  QueryTileRange range_;
  int batch_;
  bool moved_;

 public:
  SequenceInfo at;
  Visit visit;
  int begin[4], end[4];
};

}  // namespace inlay::attention::cuda
