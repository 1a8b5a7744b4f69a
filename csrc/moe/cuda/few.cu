// Which forwards are of few tokens, and the kernels that serve them.
#include "moe/cuda/few_columns.cuh"

namespace inlay::moe::cuda {
namespace {

// Of more than these, choices that are not random, as of tokens that follow each other, would cost too much. On an H200
// 16 tokens of Qwen3.5-35B, 128 pairs of about 103 experts, take 156 us here, and by tiles over 250.
constexpr int64_t kMostFewPairs = 128;
constexpr int64_t kMostFeatures = 1 << 17;  // for grids' second dimension, and 32-bit places in a row

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool aligned(const ExpertMatrices& matrices) {
  const int64_t elements = 16 / size_of(matrices.dtype);
  return aligned(matrices.data) && matrices.expert_stride % elements == 0 && matrices.row_stride % elements == 0;
}

// Each pair reads its expert's matrices from L2, each expert is read once from memory. At an H200's 5.5 TB/s of the one
// and 4.2 of the other, pairs may be 1.3 times the experts before they are what is waited for; then tiles of rows,
// which read an expert once, are the better way. Experts: as many as tokens choose at random.
constexpr double kMostPairsAnExpert = 1.3;

bool shares_little(const ExpertInputs& in) {
  const double chosen = static_cast<double>(in.slots) / static_cast<double>(in.experts);
  double unused = 1.0;
  for (int64_t token = 0; token < in.tokens; ++token) unused *= chosen < 1.0 ? 1.0 - chosen : 0.0;
  const double used = (1.0 - unused) * static_cast<double>(in.experts);
  return static_cast<double>(in.most_rows()) <= kMostPairsAnExpert * used;
}

int64_t activation_bytes(const ExpertInputs& in) {
  return divide_up(in.most_rows() * in.intermediate * size_of(in.x.dtype), 256) * 256;
}

dim3 grid_of(int64_t x, int64_t y, int64_t z = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <typename T>
void start_rows(const FewParams& p, void* stream) {
  const ExpertInputs& in = p.inputs;
  const int slots = static_cast<int>(in.slots), groups = down_groups<DownShape>(slots);
  const int block_features = UpShape::kWarps * up_features<UpShape>(in.gating.gated);
  start<few_up<T, UpShape>, UpShape::kWarps * 32>(
      p, grid_of(in.most_rows(), divide_up(in.intermediate, block_features)), stream);
  start_sized<few_down<T, DownShape>>(p, grid_of(in.tokens, divide_up(in.hidden, groups * DownShape::kRows)),
                                      slots * groups * 32, 0, 0, stream);
}

template <typename T>
void start_columns(const FewParams& p, void* stream) {
  const ExpertInputs& in = p.inputs;
  constexpr int kColumns = kBlockColumns<T, ColumnShape>, kThreads = ColumnShape::kWarps * 32;
  const int64_t block_features = in.gating.gated ? kColumns / 2 : kColumns;
  start<few_up_columns<T, ColumnShape>, kThreads>(
      p, grid_of(in.most_rows(), divide_up(in.intermediate, block_features)), stream);
  start<few_down_columns<T, ColumnShape>, kThreads>(
      p, grid_of(in.most_rows(), divide_up(in.hidden, kColumns), kDepthParts), stream);
  start<few_sum<T>, kSumThreads>(p, grid_of(in.tokens, divide_up(in.hidden, kSumThreads)), stream);
}

template <typename T>
void start_few(const FewParams& p, void* stream) {
  if (p.inputs.transposed) {
    start_columns<T>(p, stream);
  } else {
    start_rows<T>(p, stream);
  }
}

}  // namespace

bool fits_few(const ExpertForwardParams& params) {
  const ExpertInputs& in = params.inputs;
  if (params.sorted || params.keeps_rows || params.h.data) return false;
  if (in.most_rows() < 1 || in.most_rows() > kMostFewPairs || in.slots > kMostFewSlots || in.experts < 1) return false;
  const int64_t elements = 16 / size_of(in.x.dtype);
  if (in.hidden % elements != 0 || in.intermediate % elements != 0) return false;
  if (in.hidden > kMostFeatures || in.intermediate > kMostFeatures) return false;
  if (!aligned(in.x.data) || (in.tokens > 1 && in.x.layout.outer_stride % elements != 0)) return false;
  return aligned(in.gate_up_proj) && aligned(in.down_proj) && in.shared.layout.evenly_spaced() && shares_little(in);
}

int64_t few_scratch_bytes(const ExpertForwardParams& params) {
  const ExpertInputs& in = params.inputs;
  const int64_t parts = in.transposed ? kDepthParts * in.most_rows() * in.hidden : 0;
  return activation_bytes(in) + parts * static_cast<int64_t>(sizeof(float));
}

void forward_few(const ExpertForwardParams& params, void* stream) {
  const ExpertInputs& in = params.inputs;
  FewParams p;
  p.inputs = in;
  p.indices = params.indices;
  p.y = params.y;
  p.activations = params.scratch;
  p.parts = reinterpret_cast<float*>(static_cast<char*>(params.scratch) + activation_bytes(in));
  if (in.x.dtype == DType::bf16) {
    start_few<__nv_bfloat16>(p, stream);
  } else if (in.x.dtype == DType::f16) {
    start_few<__half>(p, stream);
  } else {
    start_few<float>(p, stream);
  }
}

}  // namespace inlay::moe::cuda
