// The gradients of the experts' biases: sums over each expert's rows, of dh, and of weight times dy.
//
// Blocks add up a piece of an expert's rows, some columns of them; a second kernel adds the pieces. There are as many
// pieces as it takes to have enough blocks if one expert has all rows, and one, the result itself, if experts are many.
#include "common/cuda/launch.cuh"
#include "moe/cuda/access.cuh"
#include "moe/cuda/steps.h"

namespace inlay::moe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kLoads = 4;            // rows of a warp under way
constexpr int64_t kPieces = 512;     // of all experts, about
constexpr int64_t kMostPieces = 32;  // of an expert
constexpr int64_t kPieceRows = 64;   // that are worth one

struct Params {
  Rows rows;
  const int32_t* places = nullptr;  // of a slot its row of dh; null: the sum is of dy
  int64_t most_rows = 0;
  int64_t capacity = 0;
  int64_t slots = 0;
  int64_t width = 0;
  const void* dh = nullptr;  // [capacity, width]
  RowTensor dy;              // [T, width]
  VectorTensor weights;      // of dy, or absent
  int64_t experts = 0;
  int64_t pieces = 0;
  float* partials = nullptr;  // [E, pieces, width]; null: one piece, whose sums are the result
  OutputTensor out;           // [E, width]
};

// Grid: pieces of experts, columns.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(const __grid_constant__ Params p) {
  constexpr int kColumns = 32 * N;
  __shared__ float sums_of_warps[kWarps][kColumns];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t column = first_column + lane * N;
  const int64_t expert = blockIdx.x / p.pieces, piece = blockIdx.x % p.pieces;
  wait_for_predecessor();
  release_successor();
  // Rows may come from outside: no value makes this read elsewhere.
  const auto end_of = [&](int64_t of) -> int64_t {
    const int64_t end = of < 0 ? 0 : p.rows.ends[of];
    return end < 0 ? 0 : end > p.most_rows ? p.most_rows : end;
  };
  const int64_t first = end_of(expert - 1), count = end_of(expert) - first;
  const int64_t begin = first + count * piece / p.pieces, end = first + count * (piece + 1) / p.pieces;

  float sums[N] = {};
  for (int64_t row = begin + warp; row < end && column < p.width; row += kWarps * kLoads) {
    Packed<T, N> values[kLoads];
    float weights[kLoads];
    bool given[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      given[j] = false;
      if (row + j * kWarps >= end) continue;
      const int32_t slot = p.rows.slots[row + j * kWarps];
      if (slot < 0 || slot >= p.most_rows) continue;
      weights[j] = 1.0f;
      if (p.places) {
        const int32_t place = p.places[slot];
        given[j] = place >= 0 && place < p.capacity;
        if (given[j]) values[j] = load<T, N>(static_cast<const T*>(p.dh) + place * p.width + column);
      } else {
        given[j] = true;
        const int64_t token = static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.slots);
        values[j] = load<T, N>(row_of<T>(p.dy, token) + column);
        if (p.weights.data) weights[j] = load_number(p.weights, slot);
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (!given[j]) continue;
      float wide[N];
      unpack(values[j], wide);
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] = fmaf(weights[j], wide[i], sums[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sums_of_warps[warp][lane * N + i] = sums[i];
  __syncthreads();
  const int64_t own_column = first_column + threadIdx.x;
  if (threadIdx.x >= kColumns || own_column >= p.width) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += sums_of_warps[i][threadIdx.x];
  if (p.partials) {
    p.partials[blockIdx.x * p.width + own_column] = total;
  } else {
    store_number(p.out, expert * p.width + own_column, total);
  }
}

// Grid: columns, experts.
__global__ void __launch_bounds__(kThreads) add_pieces_kernel(const __grid_constant__ Params p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  wait_for_predecessor();
  release_successor();
  if (column >= p.width) return;
  const float* const partials = p.partials + blockIdx.y * p.pieces * p.width + column;
  float total = 0.0f;
#pragma unroll 8
  for (int64_t piece = 0; piece < p.pieces; ++piece) total += partials[piece * p.width];
  store_number(p.out, blockIdx.y * p.width + column, total);
}

// A function of the shape alone.
int64_t pieces_of(const ExpertInputs& in) {
  int64_t pieces = kPieces / (in.experts > 0 ? in.experts : 1);
  const int64_t worth = divide_up(in.most_rows(), kPieceRows);
  pieces = pieces < kMostPieces ? pieces : kMostPieces;
  pieces = pieces < worth ? pieces : worth;
  return pieces > 1 ? pieces : 1;
}

void sum_rows(Params p, DType dtype, bool wide, void* scratch, void* stream) {
  if (p.pieces > 1) p.partials = static_cast<float*>(scratch);
  with_access(dtype, p.width, wide, [&](auto zero, auto width) {
    constexpr int kWidth = decltype(width)::value;
    const dim3 grid(static_cast<unsigned>(p.experts * p.pieces),
                    static_cast<unsigned>(divide_up(p.width, 32 * kWidth)));
    start<sum_rows_kernel<decltype(zero), kWidth>, kThreads>(p, grid, stream);
  });
  if (!p.partials) return;
  const dim3 grid(static_cast<unsigned>(divide_up(p.width, kThreads)), static_cast<unsigned>(p.experts));
  start<add_pieces_kernel, kThreads>(p, grid, stream);
}

}  // namespace

int64_t bias_gradients_scratch_bytes(const ExpertBackwardParams& params) {
  const ExpertInputs& in = params.inputs;
  const int64_t pieces = pieces_of(in);
  const int64_t up = params.dgate_up_bias.data ? in.pre_activations() : 0;
  const int64_t down = params.ddown_bias.data ? in.hidden : 0;
  return pieces > 1 ? in.experts * pieces * (up > down ? up : down) * static_cast<int64_t>(sizeof(float)) : 0;
}

void bias_gradients(const ExpertBackwardParams& params, const BackwardSteps& steps, void* scratch, void* stream) {
  const ExpertInputs& in = params.inputs;
  if (in.experts == 0) return;
  Params p;
  p.rows = steps.rows;
  p.most_rows = in.most_rows();
  p.capacity = steps.padded.capacity;
  p.slots = in.slots;
  p.experts = in.experts;
  p.pieces = pieces_of(in);
  if (params.dgate_up_bias.data) {
    Params up = p;
    up.places = steps.padded.places;
    up.dh = steps.dh;
    up.width = in.pre_activations();
    up.out = params.dgate_up_bias;
    sum_rows(up, in.x.dtype, aligned(up.dh), scratch, stream);
  }
  if (params.ddown_bias.data) {
    Params down = p;
    down.dy = params.dy;
    down.weights = in.weights;
    down.width = in.hidden;
    down.out = params.ddown_bias;
    sum_rows(down, in.x.dtype, aligned_rows(down.dy), scratch, stream);
  }
}

}  // namespace inlay::moe::cuda
