// What the general backward does before its products: once for each row, for each tile of queries, for each head.
#include "attention/cuda/general_scores.cuh"
#include "common/cuda/sigmoid.cuh"

namespace inlay::attention::cuda {
namespace {

using namespace inlay::cuda;

constexpr int kPrepareThreads = 256, kPrepareWarps = kPrepareThreads / 32;
constexpr int kSinkThreads = 512;

struct PrepareArguments {
  BackwardParams params;
  GeneralScratch scratch;
  ScoreRule rule;
  int streamed;    // queries of a tile
  int64_t number;  // of rows or of tiles
};

__device__ __forceinline__ float read(const TokenTensor& tensor, int64_t index) {
  float value[1];
  load_as_float(tensor.data, tensor.dtype, index, value);
  return value[0];
}

// A row is a query of a head: delta, and with a gate its gradient and that of o. By a warp each.
__global__ __launch_bounds__(kPrepareThreads) void prepare_rows_kernel(const __grid_constant__ PrepareArguments p) {
  const Inputs& in = p.params.inputs;
  const int lane = threadIdx.x % 32;
  const int64_t number = int64_t{blockIdx.x} * kPrepareWarps + threadIdx.x / 32;
  wait_for_predecessor();
  release_successor();
  if (number >= p.number) return;
  const int64_t token_number = number / in.query_heads, head = number % in.query_heads;
  const int64_t batch = token_number / in.queries.tokens, token = token_number % in.queries.tokens;
  const int64_t dout = p.params.dout.offset(batch, token, head), o = p.params.o.offset(batch, token, head);
  const int64_t gate = in.gate.offset(batch, token, head);
  const int columns = static_cast<int>(in.value_dim);
  float delta = 0.0f;
  for (int column = lane; column < columns; column += 32) {
    float gradient[1] = {read(p.params.dout, dout + column)};
    const float result = read(p.params.o, o + column);
    if (in.gate.data) {
      const float open = sigmoid<float>(read(in.gate, gate + column));
      const float dgate[1] = {gradient[0] * result * open * (1.0f - open)};
      store_from_float(p.params.dgate.data, p.params.dgate.dtype, number * columns + column, dgate);
      gradient[0] *= open;
      store_from_float(p.scratch.dout, in.q.dtype, number * columns + column, gradient);
      gradient[0] =
          read(TokenTensor{p.scratch.dout, in.q.dtype}, number * columns + column);  // as products will know it
    }
    delta = fmaf(gradient[0], result, delta);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) delta += __shfl_xor_sync(kAllLanes, delta, offset);
  if (lane != 0) return;
  const int64_t index = (batch * in.query_heads + head) * in.queries.tokens + token;
  if (p.params.dlse.data) delta -= static_cast<const float*>(p.params.dlse.data)[index];
  const float lse = static_cast<const float*>(p.params.lse.data)[index];
  p.scratch.rows[index] = {lse == -INFINITY ? INFINITY : p.rule.inside ? lse : lse * kLog2E, delta};
}

// By a warp for each tile of queries.
__global__ __launch_bounds__(kPrepareThreads) void find_ranges_kernel(const __grid_constant__ PrepareArguments p) {
  const Inputs& in = p.params.inputs;
  const int64_t number = int64_t{blockIdx.x} * kPrepareWarps + threadIdx.x / 32;
  wait_for_predecessor();
  release_successor();
  if (number >= p.number) return;
  const RowPlace place = locate(in.queries, p.streamed, number);
  const SequenceInfo at(in, place.sequence);
  const int count = min(p.streamed, at.query_count - place.first);
  QueryTileRange range{0, 0, 0, 0};
  if (count > 0) range = range_of(in, at, place.first, count);
  if (threadIdx.x % 32 == 0) p.scratch.ranges[number] = range;
}

// A sink is a key without a value: its probability, times what is taken from every gradient. By a block for each head.
__global__ __launch_bounds__(kSinkThreads) void sink_gradients_kernel(const __grid_constant__ PrepareArguments p) {
  const Inputs& in = p.params.inputs;
  const int64_t head = blockIdx.x;
  wait_for_predecessor();
  release_successor();
  float sink[1];
  load_as_float(in.sinks.data, in.sinks.dtype, head, sink);
  __shared__ float sums[kSinkThreads];
  float sum = 0.0f;
  for (int64_t batch = 0; batch < in.batch; ++batch) {
    const RowValues* const rows = p.scratch.rows + (batch * in.query_heads + head) * in.queries.tokens;
    for (int64_t i = threadIdx.x; i < in.queries.tokens; i += kSinkThreads) {
      const RowValues row = rows[i];
      sum -= exp2_fast(p.rule.inside ? (sink[0] - row.lse) * kLog2E : sink[0] * kLog2E - row.lse) * row.delta;
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float total[1] = {0.0f};
  for (int i = 0; i < kSinkThreads; ++i) total[0] += sums[i];
  store_from_float(p.params.dsinks.data, p.params.dsinks.dtype, head, total);
}

template <auto Kernel>
void start_warps(PrepareArguments& arguments, int64_t number, void* stream) {
  arguments.number = number;
  if (number == 0) return;
  const int64_t blocks = (number + kPrepareWarps - 1) / kPrepareWarps;
  start<Kernel, kPrepareThreads>(arguments, dim3(static_cast<unsigned>(blocks)), stream);
}

}  // namespace

void prepare_general_backward(const BackwardParams& params, int streamed_queries, const GeneralScratch& scratch,
                              void* stream) {
  const Inputs& in = params.inputs;
  PrepareArguments arguments{params, scratch, ScoreRule(in), streamed_queries, 0};
  start_warps<prepare_rows_kernel>(arguments, in.batch * in.queries.tokens * in.query_heads, stream);
  start_warps<find_ranges_kernel>(arguments, in.queries.chunk_bound(streamed_queries), stream);
  if (params.dsinks.data && in.query_heads > 0) {
    start<sink_gradients_kernel, kSinkThreads>(arguments, dim3(static_cast<unsigned>(in.query_heads)), stream);
  }
}

}  // namespace inlay::attention::cuda
