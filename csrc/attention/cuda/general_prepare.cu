// What the general kernels do before their products: once for each cell of a mask; and in the backward for each row,
// for each tile of queries, for each head.
#include "attention/cuda/general_scores.cuh"
#include "attention/cuda/row_gradients.cuh"

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
  const auto delta_in = [&](auto element) {
    return row_delta<decltype(element)>(p.params, p.scratch.dout, batch, token, head, lane, 32);
  };
  float delta = in.q.dtype == DType::f32    ? delta_in(float())
                : in.q.dtype == DType::bf16 ? delta_in(__nv_bfloat16())
                                            : delta_in(__half());
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

struct CellArguments {
  ScoreTensor mask;
  MaskCells cells;
  int queries, keys;  // of the mask's own rows, and of a word where it has one key for all
  int heads, rows;    // the cells' own sizes
  int64_t number;     // of warps
};

// Whether some and whether all of a cell's keys are seen: those of `rows` queries, at most kCell, and of `keys` keys.
__device__ __forceinline__ uint8_t look_at_cell(const ScoreTensor& mask, const uint8_t* first, int rows, int keys) {
  bool seen = false, hidden = false;
  if (keys == kCell && mask.key_stride == 1 && mask.query_stride % kCell == 0 &&
      reinterpret_cast<uintptr_t>(first) % kCell == 0) {
    uint4 any{0, 0, 0, 0}, all{~0u, ~0u, ~0u, ~0u};
#pragma unroll
    for (int row = 0; row < kCell; ++row) {  // the last of them again where there are fewer
      const uint4 four = *reinterpret_cast<const uint4*>(first + min(row, rows - 1) * mask.query_stride);
      any = {any.x | four.x, any.y | four.y, any.z | four.z, any.w | four.w};
      all = {all.x & four.x, all.y & four.y, all.z & four.z, all.w & four.w};
    }
    const auto has_zero = [](uint32_t bytes) { return ((bytes - 0x01010101u) & ~bytes & 0x80808080u) != 0; };
    seen = (any.x | any.y | any.z | any.w) != 0;
    hidden = has_zero(all.x) || has_zero(all.y) || has_zero(all.z) || has_zero(all.w);
  } else {
    for (int row = 0; row < rows; ++row) {
      for (int key = 0; key < keys; ++key) {
        const bool sees = first[row * mask.query_stride + key * mask.key_stride] != 0;
        seen |= sees;
        hidden |= !sees;
      }
    }
  }
  return static_cast<uint8_t>((seen ? 1 : 0) | (hidden ? 2 : 0));
}

// By a warp for each 32 neighbouring cells of kCell queries.
__global__ __launch_bounds__(kPrepareThreads) void find_mask_cells_kernel(const __grid_constant__ CellArguments p) {
  int64_t rest = int64_t{blockIdx.x} * kPrepareWarps + threadIdx.x / 32;
  wait_for_predecessor();
  release_successor();
  if (rest >= p.number) return;
  const int row_bytes = (p.cells.key_stride ? p.cells.row_words : 1) * 4, blocks = (row_bytes + 31) / 32;
  const int cell = static_cast<int>(rest % blocks) * 32 + static_cast<int>(threadIdx.x % 32);
  rest /= blocks;
  if (cell >= row_bytes) return;
  const int row = static_cast<int>(rest % p.rows);
  const int64_t head = rest / p.rows % p.heads, batch = rest / p.rows / p.heads;
  const uint8_t* const first =
      static_cast<const uint8_t*>(p.mask.data) + p.mask.offset(batch, head, row * kCell, cell * kCell);
  reinterpret_cast<uint8_t*>(p.cells.words)[rest * row_bytes + cell] =
      look_at_cell(p.mask, first, min(kCell, p.queries - row * kCell), min(kCell, p.keys - cell * kCell));
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

// Of arguments that say how many.
template <auto Kernel, typename Arguments>
void start_warps(const Arguments& arguments, void* stream) {
  if (arguments.number == 0) return;
  const int64_t blocks = (arguments.number + kPrepareWarps - 1) / kPrepareWarps;
  start<Kernel, kPrepareThreads>(arguments, dim3(static_cast<unsigned>(blocks)), stream);
}

}  // namespace

void find_mask_cells(const Inputs& in, const MaskCells& cells, void* stream) {
  if (!cells.words) return;
  const ScoreTensor& mask = in.mask;
  CellArguments arguments{mask, cells, 1, kWordKeys, 1, 1, 0};
  if (mask.query_stride) arguments.queries = static_cast<int>(in.queries.tokens);
  if (mask.key_stride) arguments.keys = static_cast<int>(in.keys.tokens);
  if (mask.head_stride) arguments.heads = static_cast<int>(in.query_heads);
  if (mask.query_stride) arguments.rows = cells.queries;
  const int64_t row_words = mask.key_stride ? cells.row_words : 1;
  arguments.number = cells.bytes / 4 / row_words * ((row_words + 7) / 8);
  start_warps<find_mask_cells_kernel>(arguments, stream);
}

void prepare_general_backward(const BackwardParams& params, int streamed_queries, const GeneralScratch& scratch,
                              void* stream) {
  const Inputs& in = params.inputs;
  PrepareArguments arguments{params, scratch, ScoreRule(in), streamed_queries,
                             in.batch * in.queries.tokens * in.query_heads};
  start_warps<prepare_rows_kernel>(arguments, stream);
  arguments.number = in.queries.chunk_bound(streamed_queries);
  start_warps<find_ranges_kernel>(arguments, stream);
  if (params.dsinks.data && in.query_heads > 0) {
    start<sink_gradients_kernel, kSinkThreads>(arguments, dim3(static_cast<unsigned>(in.query_heads)), stream);
  }
}

}  // namespace inlay::attention::cuda
