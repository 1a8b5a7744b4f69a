// What of the backward is done once for each row of queries, before and after the products.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "attention/cuda/backward_rows.h"
#include "attention/cuda/row_gradients.cuh"
#include "attention/cuda/rows.cuh"
#include "attention/cuda/tiles.cuh"

namespace inlay::attention::cuda {
namespace {

constexpr int kRowThreads = 256;

struct PrepareParams {
  BackwardParams backward;  // dout aligned
  float* log_scales;
  float* deltas;
  float* dq;
  int64_t dq_floats;
  unsigned* turns;
  int64_t turn_count;
  void* dout;     // times sigmoid(gate)
  int row_lanes;  // neighbouring threads to a row, a power of two
};

// The logarithms and delta = <dO, O> - dlse of each row, dgate, and zeros for dq.
template <typename T>
__global__ __launch_bounds__(kRowThreads) void prepare_rows_kernel(PrepareParams p) {
  wait_for_predecessor();
  release_successor();
  const BackwardParams& backward = p.backward;
  const Inputs& in = backward.inputs;
  const int64_t first = int64_t{blockIdx.x} * kRowThreads + threadIdx.x, step = int64_t{gridDim.x} * kRowThreads;
  for (int64_t i = first; i < p.dq_floats / 4; i += step) reinterpret_cast<float4*>(p.dq)[i] = float4{0, 0, 0, 0};
  for (int64_t i = first; i < p.turn_count; i += step) p.turns[i] = 0;

  const int lanes = p.row_lanes, lane = static_cast<int>(threadIdx.x) % lanes;
  const int64_t rows = in.batch * in.queries.tokens * in.query_heads;  // fewer than 2^32
  const uint32_t tokens = static_cast<uint32_t>(in.queries.tokens), heads = static_cast<uint32_t>(in.query_heads);
  // Whole warps go round together, for the sums.
  for (int64_t at = first / lanes; at - first / lanes % (32 / lanes) < rows; at += step / lanes) {
    const uint32_t index = static_cast<uint32_t>(min(at, rows - 1));  // in the order of lse
    const uint32_t sequence = index / tokens, place = index % tokens, batch = sequence / heads, head = sequence % heads;
    const float delta = row_delta<T>(backward, p.dout, batch, place, head, lane, lanes);
    if (lane == 0 && at < rows) {
      const float lse = static_cast<const float*>(backward.lse.data)[index];
      p.log_scales[index] = lse == -INFINITY ? -INFINITY : -lse * kLog2E;
      p.deltas[index] = backward.dlse.data ? delta - static_cast<const float*>(backward.dlse.data)[index] : delta;
    }
  }
}

struct FinishParams {
  Inputs inputs;
  const float* dq;
  void* out;
  int half_columns;
  int tiles;  // of one head
  bool halves_are_columns;
};

// Sums of dq from the order of registers to rows, times the scale. A block of 128 threads has half a tile.
template <typename T, int kQueries>
__global__ __launch_bounds__(128) void finish_queries_kernel(FinishParams p) {
  wait_for_predecessor();
  release_successor();
  const Inputs& in = p.inputs;
  const int64_t tile = blockIdx.x / 2;
  const int half = blockIdx.x % 2, place = static_cast<int>(tile % p.tiles);
  const int64_t head = tile / p.tiles;  // of all batch rows
  const bool packed = in.queries.offsets != nullptr;
  const int64_t sequence = packed ? sequence_at<kQueries>(in.queries, place) : head / in.query_heads;
  const Sequence queries = in.queries[sequence];
  const int64_t first = (packed ? place - in.queries.first_chunk(sequence, kQueries) : place) * kQueries;
  const int lane = threadIdx.x % 32;
  const int64_t own = first + (p.halves_are_columns ? 0 : half * 64) + threadIdx.x / 32 * 16 + lane / 4;
  const int first_column = p.halves_are_columns ? half * p.half_columns : 0;
  const float* from = p.dq + ((tile * 2 + half) * 64 * p.half_columns + threadIdx.x * 4);
  T* rows[2];
  bool there[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t query = own + 8 * r;
    there[r] = query < queries.end - queries.begin;
    const int64_t token = queries.batch * in.queries.tokens + queries.begin + query;
    rows[r] = static_cast<T*>(p.out) + (token * in.query_heads + head % in.query_heads) * in.head_dim + first_column;
  }
  const float scale = static_cast<float>(in.scale);
  const int columns = min(p.half_columns, static_cast<int>(in.head_dim) - first_column);
  for (int column = 0; column < columns; column += 32) {
    Accumulator values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i, from += 512) {
      const float4 four = *reinterpret_cast<const float4*>(from);
      values[i][0] = four.x;
      values[i][1] = four.y;
      values[i][2] = four.z;
      values[i][3] = four.w;
    }
    store_rows<T>(rows, there, columns - column, values, {scale, scale});
    rows[0] += 32;
    rows[1] += 32;
  }
}

struct SinkParams {
  Inputs inputs;
  const float* log_scales;
  const float* deltas;
  OutputTensor dsinks;
};

// dsink = - sum over the head's rows of exp(sink - lse) delta; a block has a head.
template <typename T>
__global__ __launch_bounds__(kRowThreads) void finish_sinks_kernel(SinkParams p) {
  wait_for_predecessor();
  release_successor();
  const Inputs& in = p.inputs;
  const int64_t head = blockIdx.x, tokens = in.queries.tokens;
  float sink[1];
  load_as_float(in.sinks.data, in.sinks.dtype, head, sink);
  float sum = 0.0f;
  for (int64_t batch = 0; batch < in.batch; ++batch) {
    const int64_t first = (batch * in.query_heads + head) * tokens;
    for (int64_t i = threadIdx.x; i < tokens; i += kRowThreads) {
      sum -= exp2f(fmaf(sink[0], kLog2E, p.log_scales[first + i])) * p.deltas[first + i];
    }
  }
  __shared__ float sums[kRowThreads / 32];
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int i = 1; i < kRowThreads / 32; ++i) sum += sums[i];
  if (p.dsinks.dtype == DType::f32) {
    static_cast<float*>(p.dsinks.data)[head] = sum;
  } else {
    static_cast<T*>(p.dsinks.data)[head] = from_float<T>(sum);
  }
}

template <typename T>
void prepare(const BackwardParams& params, const BackwardScratch& scratch, void* stream) {
  PrepareParams p{params,        scratch.log_scales, scratch.deltas, scratch.dq, scratch.dq_floats,
                  scratch.turns, scratch.turn_count, scratch.dout,   1};
  while (p.row_lanes < 32 && p.row_lanes * 8 < params.inputs.value_dim) p.row_lanes *= 2;
  const int64_t rows = params.inputs.batch * params.inputs.queries.tokens * params.inputs.query_heads;
  if (rows >= int64_t{1} << 32) fail("attention_bwd: q must have fewer than 2^32 rows");
  const auto launch = resident_launch<prepare_rows_kernel<T>, kRowThreads, 0, PrepareParams>(
      divide_up(rows * p.row_lanes, kRowThreads));
  launch.start(p, launch.blocks, stream);
}

template <typename T>
void finish(const BackwardParams& params, const BackwardShape& shape, const BackwardScratch& scratch, void* stream) {
  const Inputs& in = params.inputs;
  const int64_t tiles = query_tiles(in, shape.queries);
  const FinishParams p{
      in, scratch.dq, params.dq.data, shape.half_columns(), static_cast<int>(tiles), shape.halves_are_columns()};
  const dim3 grid(static_cast<unsigned>(tiles * in.batch * in.query_heads * 2));
  if (shape.queries == 64) {
    start<finish_queries_kernel<T, 64>, 128>(p, grid, stream);
  } else {
    start<finish_queries_kernel<T, 128>, 128>(p, grid, stream);
  }
  if (in.sinks.data) {
    start<finish_sinks_kernel<T>, kRowThreads>(SinkParams{in, scratch.log_scales, scratch.deltas, params.dsinks},
                                               dim3(static_cast<unsigned>(in.query_heads)), stream);
  }
}

}  // namespace

void prepare_rows(const BackwardParams& params, const BackwardScratch& scratch, void* stream) {
  const auto run = params.inputs.q.dtype == DType::bf16 ? prepare<__nv_bfloat16> : prepare<__half>;
  run(params, scratch, stream);
}

void finish_rows(const BackwardParams& params, const BackwardShape& shape, const BackwardScratch& scratch,
                 void* stream) {
  const auto run = params.inputs.q.dtype == DType::bf16 ? finish<__nv_bfloat16> : finish<__half>;
  run(params, shape, scratch, stream);
}

}  // namespace inlay::attention::cuda
