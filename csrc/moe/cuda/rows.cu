// Sorts choices by their experts, keeping the order of slots, and lays the sorted rows out in padded ones.
//
// find_rows() is a counting sort. Few choices are one block's: its warps count theirs, then put each where the counts
// of the experts, warps and lanes before it say. Of many, blocks count a stretch each in a kernel before, and add up
// what was counted elsewhere themselves: a table of 128 blocks is read from the second-level cache sooner than a third
// kernel starts. pad_rows(), and choices that came sorted, know the ends and only lay out.
//
// Counts are integers, so atomics would change nothing; ranks come from each warp's own counters, so they need none.
// Experts are taken in ranges of as many as fit into shared memory, the grid's second dimension: of any model's, one.
#include "common/cuda/launch.cuh"
#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {
namespace {

using namespace inlay::cuda;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kRange = static_cast<int>(kMaxRoutedExperts) + 1;  // a router's most experts, and none
constexpr int kPerThread = (kRange + kThreads - 1) / kThreads;
constexpr int64_t kFewChoices = 8192;
constexpr int64_t kStretch = 2048;     // choices of a block, at least
constexpr int64_t kTableSize = 32768;  // counts that each block reads again, about
constexpr int64_t kMostStretches = 128;
constexpr int64_t kFewestStretches = 16;  // however many experts there are
constexpr int64_t kPaddingBlocks = 264;
constexpr unsigned kAllLanes = 0xffffffffu;

struct SortParams {
  IndexTensor indices;
  Rows rows;
  PaddedRows padded;
  int64_t count = 0;    // choices
  int64_t slots = 0;    // K
  int64_t experts = 0;  // E; bin E counts the choices of none
  int64_t stretch = 0;  // choices of a block, a multiple of kThreads
  int64_t stretches = 0;
  int32_t* counts = nullptr;  // [stretches, E + 1]; null: one block has all choices
};

struct PadParams {
  IndexTensor ends;  // if sorted
  Rows rows;
  PaddedRows padded;
  int64_t count = 0;
  int64_t slots = 0;
  int64_t experts = 0;
  bool sorted = false;  // rows are written, from `ends`; else read
};

// Both in the order of experts: rows as they are stored, and rounded up.
struct Extent {
  int32_t rows = 0;
  int32_t padded = 0;
};

struct Sum {
  __device__ Extent operator()(Extent a, Extent b) const { return {a.rows + b.rows, a.padded + b.padded}; }
};
struct Larger {
  __device__ Extent operator()(Extent a, Extent b) const {
    return {a.rows > b.rows ? a.rows : b.rows, a.padded > b.padded ? a.padded : b.padded};
  }
};

// What the threads before this one have, together, and what all have. Zero is neutral to `combine`.
template <class Combine>
__device__ Extent scan(Extent own, Combine combine, Extent& all) {
  __shared__ Extent of_warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Extent upto = own;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Extent other{__shfl_up_sync(kAllLanes, upto.rows, offset), __shfl_up_sync(kAllLanes, upto.padded, offset)};
    if (lane >= offset) upto = combine(other, upto);
  }
  Extent before{__shfl_up_sync(kAllLanes, upto.rows, 1), __shfl_up_sync(kAllLanes, upto.padded, 1)};
  if (lane == 0) before = {};
  if (lane == 31) of_warps[warp] = upto;
  __syncthreads();
  Extent warps{};
  all = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i == warp) warps = all;
    all = combine(all, of_warps[i]);
  }
  __syncthreads();
  return combine(warps, before);
}

__device__ int32_t round_up(int32_t rows, int32_t unit) { return (rows + unit - 1) / unit * unit; }

// Calls use(unit, expert) for this block's units of padded rows, a warp each: those of the `size` experts whose padded
// rows begin at starts[0] to starts[size], and with `is_last` those beyond, whose expert is -1.
template <class Use>
__device__ void for_each_unit(const PaddedRows& padded, const int32_t* starts, int size, bool is_last, Use use) {
  const int64_t end = is_last ? padded.capacity / padded.unit : starts[size] / padded.unit;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t unit = starts[0] / padded.unit + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       unit < end; unit += step) {
    const int64_t row = unit * padded.unit;
    int low = 0, high = size;  // the last expert that begins at the row, or before: those before it there are empty
    while (low + 1 < high) {
      const int middle = (low + high) / 2;
      if (starts[middle] <= row) {
        low = middle;
      } else {
        high = middle;
      }
    }
    use(unit, row < starts[size] ? low : -1);
  }
}

// Calls use(choice, bin) for a warp's part of its block's stretch, with all lanes: bin counts from `first`, and is -1
// for lanes without a choice in the range.
template <class Use>
__device__ void for_each_choice(const SortParams& p, int64_t first, int range, Use use) {
  constexpr int kLoads = 4;  // under way
  const int64_t of_warp = p.stretch / kWarps;
  const int64_t begin = blockIdx.x * p.stretch + threadIdx.x / 32 * of_warp;
  const int64_t end = begin + of_warp < p.count ? begin + of_warp : p.count;
  for (int64_t i = begin + threadIdx.x % 32; i - static_cast<int>(threadIdx.x % 32) < end; i += 32 * kLoads) {
    int bins[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      bins[j] = -1;
      if (i + 32 * j >= end) continue;
      const int64_t index = p.indices[i + 32 * j];
      const int64_t bin = (index < 0 || index > p.experts ? p.experts : index) - first;
      if (bin >= 0 && bin < range) bins[j] = static_cast<int>(bin);
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) use(i + 32 * j, bins[j]);
  }
}

// counts[bin] of this warp's choices.
__device__ void count_choices(const SortParams& p, int64_t first, int range, int32_t* counts) {
  for_each_choice(p, first, range, [&](int64_t, int bin) {
    const unsigned alike = __match_any_sync(kAllLanes, bin);
    if (bin >= 0 && static_cast<int>(threadIdx.x % 32) == __ffs(alike) - 1) counts[bin] += __popc(alike);
    __syncwarp();
  });
}

__device__ int range_of(int64_t first, int64_t bins) {
  return static_cast<int>(bins - first < kRange ? bins - first : kRange);
}

// Grid: stretches, ranges.
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ SortParams p) {
  extern __shared__ int32_t shared_counts[];  // [kWarps, range]
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRange;
  const int range = range_of(first, p.experts + 1);
  for (int i = threadIdx.x; i < kWarps * range; i += kThreads) shared_counts[i] = 0;
  __syncthreads();
  wait_for_predecessor();
  release_successor();
  count_choices(p, first, range, shared_counts + threadIdx.x / 32 * range);
  __syncthreads();
  int32_t* const target = p.counts + blockIdx.x * (p.experts + 1) + first;
  for (int bin = threadIdx.x; bin < range; bin += kThreads) {
    int32_t total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += shared_counts[warp * range + bin];
    target[bin] = total;
  }
}

// A range's table, added up: each bin's choices of all blocks, and of those before this one.
__device__ void add_up_table(const SortParams& p, int64_t first, int range, int32_t* totals, int32_t* before) {
  const int64_t bins = p.experts + 1;
  const int parts = kThreads / range > 0 ? kThreads / range : 1;  // of the stretches
  for (int bin = threadIdx.x; bin < range; bin += kThreads) totals[bin] = before[bin] = 0;
  __syncthreads();
  for (int item = threadIdx.x; item < parts * range; item += kThreads) {
    const int bin = item % range;
    int32_t total = 0, of_others = 0;
#pragma unroll 8
    for (int64_t stretch = item / range; stretch < p.stretches; stretch += parts) {
      const int32_t count = p.counts[stretch * bins + first + bin];
      total += count;
      if (stretch < blockIdx.x) of_others += count;
    }
    atomicAdd(totals + bin, total);
    atomicAdd(before + bin, of_others);
  }
  __syncthreads();
}

// Grid: stretches, ranges.
__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ SortParams p) {
  extern __shared__ int32_t shared_counts[];  // [kWarps, widest range], then what follows, [widest range + 1] each
  const int64_t bins = p.experts + 1;
  const int widest = range_of(0, bins);
  int32_t* const totals = shared_counts + kWarps * widest;
  int32_t* const before = totals + widest + 1;
  int32_t* const row_starts = before + widest + 1;
  int32_t* const padded_starts = row_starts + widest + 1;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRange;
  const int range = range_of(first, bins);
  const bool is_last = first + range == bins;
  int32_t* const own_counts = shared_counts + threadIdx.x / 32 * range;
  for (int i = threadIdx.x; i < kWarps * range; i += kThreads) shared_counts[i] = 0;
  __syncthreads();
  wait_for_predecessor();
  release_successor();
  count_choices(p, first, range, own_counts);
  __syncthreads();

  Extent base{};  // where the range's first expert begins
  for (int64_t other = 0; other <= first; other += kRange) {
    const int size = range_of(other, bins);
    if (p.counts) {
      add_up_table(p, other, size, totals, before);
    } else {
      for (int bin = threadIdx.x; bin < range; bin += kThreads) {
        int32_t total = 0;
        for (int warp = 0; warp < kWarps; ++warp) total += shared_counts[warp * range + bin];
        totals[bin] = total;
        before[bin] = 0;
      }
      __syncthreads();
    }
    Extent own[kPerThread], together{};
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int bin = threadIdx.x * kPerThread + i;
      const int32_t rows = bin < size ? totals[bin] : 0;
      own[i] = {rows, round_up(rows, p.padded.unit)};
      together = Sum()(together, own[i]);
    }
    Extent all;
    Extent start = Sum()(base, scan(together, Sum(), all));
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int bin = threadIdx.x * kPerThread + i;
      if (bin <= size) {
        row_starts[bin] = start.rows;
        padded_starts[bin] = start.padded;
      }
      start = Sum()(start, own[i]);
    }
    base = Sum()(base, all);
    __syncthreads();
  }

  const int experts = is_last ? range - 1 : range;
  for (int bin = threadIdx.x; bin < range; bin += kThreads) {
    int32_t rank = before[bin];  // of each warp's first choice among those of its expert
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int32_t count = shared_counts[warp * range + bin];
      shared_counts[warp * range + bin] = rank;
      rank += count;
    }
    if (blockIdx.x == 0 && bin < experts) p.rows.ends[first + bin] = row_starts[bin] + totals[bin];
  }
  __syncthreads();
  for_each_choice(p, first, range, [&](int64_t choice, int bin) {
    const unsigned alike = __match_any_sync(kAllLanes, bin);
    const unsigned earlier = alike & ((1u << threadIdx.x % 32) - 1);
    const int32_t first_rank = bin >= 0 ? own_counts[bin] : 0;
    __syncwarp();
    if (bin >= 0 && earlier == 0) own_counts[bin] = first_rank + __popc(alike);
    __syncwarp();
    if (bin < 0) return;
    const int32_t rank = first_rank + __popc(earlier);
    p.rows.slots[row_starts[bin] + rank] = static_cast<int32_t>(choice);
    const int32_t place = bin < experts ? padded_starts[bin] + rank : -1;
    p.padded.places[choice] = place;
    if (place >= 0) {
      p.padded.tokens[place] = static_cast<int32_t>(static_cast<uint32_t>(choice) / static_cast<uint32_t>(p.slots));
    }
  });

  // What no choice writes to. The experts' last unit has as many rows of theirs as are left.
  for_each_unit(p.padded, padded_starts, experts, is_last, [&](int64_t unit, int expert) {
    const int64_t row = unit * p.padded.unit;
    const int64_t end = expert < 0 ? 0 : padded_starts[expert] + static_cast<int64_t>(totals[expert]);
    for (int64_t i = row + threadIdx.x % 32; i < row + p.padded.unit; i += 32) {
      if (i >= end) p.padded.tokens[i] = -1;
    }
    if (threadIdx.x % 32 == 0) p.padded.experts[unit] = expert < 0 ? -1 : static_cast<int32_t>(first + expert);
  });
}

// Grid: blocks that share the units, ranges. What it reads may come from outside: no value makes it write elsewhere.
__global__ void __launch_bounds__(kThreads) pad_kernel(const __grid_constant__ PadParams p) {
  __shared__ int32_t row_starts[kRange + 1], padded_starts[kRange + 1];
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRange;
  const int range = range_of(first, p.experts);
  const bool is_last = first + range == p.experts;
  wait_for_predecessor();
  release_successor();
  Extent base{};
  for (int64_t other = 0; other <= first; other += kRange) {
    const int size = range_of(other, p.experts);
    Extent ends[kPerThread], together{};  // in `rows` the largest end so far
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = threadIdx.x * kPerThread + i;
      int64_t end = 0;
      if (expert < size) end = p.sorted ? p.ends[other + expert] : p.rows.ends[other + expert];
      end = end < 0 ? 0 : end > p.count ? p.count : end;
      ends[i] = together = Larger()(together, {static_cast<int32_t>(end), 0});
    }
    Extent all;
    const Extent previous = Larger()({base.rows, 0}, scan(together, Larger(), all));
    Extent padded{};
    int32_t row = previous.rows;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      ends[i].rows = ends[i].rows > previous.rows ? ends[i].rows : previous.rows;
      ends[i].padded = round_up(ends[i].rows - row, p.padded.unit);
      padded.padded += ends[i].padded;
      row = ends[i].rows;
    }
    Extent all_padded;
    int32_t start = base.padded + scan(padded, Sum(), all_padded).padded;
    row = previous.rows;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int expert = threadIdx.x * kPerThread + i;
      if (expert <= size) {
        row_starts[expert] = row;
        padded_starts[expert] = start;
      }
      if (p.sorted && blockIdx.x == 0 && other == first && expert < size) p.rows.ends[first + expert] = ends[i].rows;
      row = ends[i].rows;
      start += ends[i].padded;
    }
    base = {all.rows > base.rows ? all.rows : base.rows, base.padded + all_padded.padded};
    __syncthreads();
  }

  for_each_unit(p.padded, padded_starts, range, is_last, [&](int64_t unit, int expert) {
    for (int64_t i = unit * p.padded.unit + threadIdx.x % 32; i < (unit + 1) * p.padded.unit; i += 32) {
      int32_t token = -1;
      const int64_t row = expert < 0 ? 0 : row_starts[expert] + (i - padded_starts[expert]);
      if (expert >= 0 && row < row_starts[expert + 1]) {
        const int64_t slot = p.sorted ? row : p.rows.slots[row];
        if (slot >= 0 && slot < p.count) {
          token = static_cast<int32_t>(static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.slots));
          p.padded.places[slot] = static_cast<int32_t>(i);
          if (p.sorted) p.rows.slots[row] = static_cast<int32_t>(row);
        }
      }
      p.padded.tokens[i] = token;
    }
    if (threadIdx.x % 32 == 0) p.padded.experts[unit] = expert < 0 ? -1 : static_cast<int32_t>(first + expert);
  });
  if (!is_last) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = row_starts[range] + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < p.count;
       row += step) {
    const int64_t slot = p.sorted ? row : p.rows.slots[row];
    if (slot >= 0 && slot < p.count) p.padded.places[slot] = -1;
    if (p.sorted) p.rows.slots[row] = static_cast<int32_t>(row);
  }
}

int64_t clamp(int64_t value, int64_t least, int64_t most) {
  return value < least ? least : value > most ? most : value;
}

unsigned ranges_of(int64_t bins) { return static_cast<unsigned>(bins > 0 ? divide_up(bins, kRange) : 1); }

bool has_table(const ExpertInputs& in) { return in.most_rows() > kFewChoices || in.experts + 1 > kRange; }

// A function of the shape alone.
int64_t stretches_of(const ExpertInputs& in) {
  if (!has_table(in)) return 1;
  const int64_t most = clamp(kTableSize / (in.experts + 1), kFewestStretches, kMostStretches);
  return clamp(divide_up(in.most_rows(), kStretch), 1, most);
}

void start_padding(const PadParams& params, void* stream) {
  const int64_t units = divide_up(params.padded.capacity / params.padded.unit, kWarps);
  const int64_t rows = divide_up(params.count, kThreads);
  const int64_t blocks = clamp(units > rows ? units : rows, 1, kPaddingBlocks);
  start<pad_kernel, kThreads>(params, dim3(static_cast<unsigned>(blocks), ranges_of(params.experts)), stream);
}

}  // namespace

int64_t find_rows_scratch_bytes(const ExpertInputs& in) {
  return has_table(in) ? stretches_of(in) * (in.experts + 1) * static_cast<int64_t>(sizeof(int32_t)) : 0;
}

void find_rows(const ExpertForwardParams& params, const PaddedRows& padded, void* scratch, void* stream) {
  const ExpertInputs& in = params.inputs;
  if (params.sorted) {
    start_padding({params.ends, params.rows, padded, in.tokens, 1, in.experts, true}, stream);
    return;
  }
  SortParams sort;
  sort.indices = params.indices;
  sort.rows = params.rows;
  sort.padded = padded;
  sort.count = in.most_rows();
  sort.slots = in.slots;
  sort.experts = in.experts;
  sort.stretches = stretches_of(in);
  sort.stretch = divide_up(divide_up(sort.count, sort.stretches), kThreads) * kThreads;
  constexpr int kBytes = static_cast<int>(sizeof(int32_t));
  const int widest = static_cast<int>(in.experts + 1 < kRange ? in.experts + 1 : kRange);
  const dim3 grid(static_cast<unsigned>(sort.stretches), ranges_of(in.experts + 1));
  if (has_table(in)) {
    sort.counts = static_cast<int32_t*>(scratch);
    start_sized<count_kernel>(sort, grid, kThreads, kWarps * widest * kBytes, kWarps * kRange * kBytes, stream);
  }
  start_sized<place_kernel>(sort, grid, kThreads, ((kWarps + 4) * widest + 4) * kBytes,
                            ((kWarps + 4) * kRange + 4) * kBytes, stream);
}

void pad_rows(const ExpertInputs& in, const Rows& rows, const PaddedRows& padded, void* stream) {
  start_padding({{}, rows, padded, in.most_rows(), in.slots, in.experts, false}, stream);
}

}  // namespace inlay::moe::cuda
