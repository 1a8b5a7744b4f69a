// What the MoE kernels of one instruction set offer; launch.cpp and router_launch.cpp choose among these tables and
// deal out the work.
#pragma once

#include "common/cpu/elements.h"
#include "moe/params.h"

namespace inlay::moe {

// Sizes of blocks, for which a core's second-level cache has room. A result depends on none of them: each is a chain of
// multiply-adds over its own inputs in their order, however rows and features are cut.
constexpr int64_t kTileRows = 128;     // rows of an expert that meet its weights together, at most
constexpr int64_t kTileDepth = 256;    // of a product's inner dimension, that are packed at a time
constexpr int64_t kTileFeatures = 96;  // of weights, likewise
constexpr int64_t kUpFeatures = 256;   // activations of a task
constexpr int64_t kCombineTokens = 1024;
constexpr int64_t kOuterColumns = 256;

// Rows [row, row + count) of an expert, and activations [feature, feature + features).
struct UpTask {
  int64_t expert = 0;
  int64_t row = 0;
  int64_t count = 0;
  int64_t feature = 0;
  int64_t features = 0;
};

// Tokens [token, end) and features [feature, feature + features) of a result.
struct CombineTask {
  int64_t token = 0;
  int64_t end = 0;
  int64_t feature = 0;
  int64_t features = 0;
};

// A sum over an expert's rows of outer products: rows [row, row + rows) and columns [column, column + columns) of one
// expert's gradient.
struct OuterTask {
  int64_t expert = 0;
  int64_t row = 0;
  int64_t rows = 0;
  int64_t column = 0;
  int64_t columns = 0;
};

// What experts compute for each row, before it is multiplied by their second matrices: [rows, depth] dense, T.
struct RowValues {
  void* data = nullptr;
  int64_t depth = 0;
};

// result[t] = sum over t's rows of weight * (matrix of the row's expert * values[row] + bias), in the order of experts;
// then + shared * sigmoid(gate).
struct Combination {
  const ExpertInputs* inputs = nullptr;
  Rows rows;
  RowValues values;
  ExpertMatrices matrices;
  bool depth_is_rows = false;  // of a matrix: it is stored [depth, features], else [features, depth]
  ExpertMatrices bias;         // or absent
  VectorTensor weights;        // or absent
  RowTensor shared;            // or absent
  VectorTensor shared_gate;
  OutputTensor y;  // [T, features]
  int64_t features = 0;
};

// The rows of an outer product: a row's own values, or those of its token, times its weight or not.
struct RowSource {
  const void* data = nullptr;
  int64_t stride = 0;
  bool of_token = false;
  bool weighted = false;
};

// dmatrices[e] = sum over e's rows of left[row]^T right[row].
struct OuterProducts {
  const ExpertInputs* inputs = nullptr;
  Rows rows;
  RowSource left;
  RowSource right;
  int64_t height = 0;
  int64_t width = 0;
  OutputTensor out;  // [E, height, width]
};

// The backward's scratch memory, T but for the parts of dweights, which are wide.
struct BackwardScratch {
  void* h = nullptr;        // [N, P], where it has to be computed again
  void* dh = nullptr;       // [N, P]: the gradient of what h is, times the row's weight
  void* a = nullptr;        // [N, I]: activations, where they are needed
  void* weights = nullptr;  // [blocks of activations, N]: parts of the gradient of each row's weight
};

// `memory`: one thread's own, aligned to kLineBytes, of as many bytes as `memory_bytes` says.
struct Kernels {
  void (*route)(const RouterForwardParams& p, int64_t begin, int64_t end, int64_t* counts, void* sums, void* memory);
  void (*route_backward)(const RouterBackwardParams& p, int64_t begin, int64_t end, void* memory);
  // mean[i] of experts [begin, end), from the sums of groups [groups, E].
  void (*mean)(const void* sums, int64_t groups, int64_t experts, int64_t tokens, const OutputTensor& mean);
  // Activations [N, I] and, where wanted, h.
  void (*up)(const ExpertForwardParams& p, void* activations, const UpTask& task, void* memory);
  void (*combine)(const Combination& p, const CombineTask& task, void* memory);
  void (*activation_gradient)(const ExpertBackwardParams& p, const BackwardScratch& scratch, const UpTask& task,
                              void* memory);
  void (*outer)(const OuterProducts& p, const OuterTask& task, void* memory);
  // The sum of an expert's rows [width], as `out` [E, width].
  void (*sum_rows)(const ExpertInputs& inputs, const Rows& rows, const RowSource& source, int64_t expert, int64_t width,
                   const OutputTensor& out, void* memory);
  void (*weight_gradients)(const ExpertBackwardParams& p, const BackwardScratch& scratch, int64_t begin, int64_t end);
  void (*shared_gradients)(const ExpertBackwardParams& p, int64_t begin, int64_t end);
  int64_t (*router_bytes)(const RouterInputs& inputs);
  int64_t (*expert_bytes)(const ExpertInputs& inputs);
};

extern const Kernels kGenericKernels;
extern const Kernels kGenericF64Kernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

}  // namespace inlay::moe
