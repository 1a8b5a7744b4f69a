// The attention family's contract between bindings and kernels. The maths is in python/inlay/ops/attention.py.
#pragma once

#include "attention/dropout.h"
#include "common/indices.h"
#include "common/rows.h"
#include "common/sequences.h"

namespace inlay::attention {

constexpr int64_t kMaxHeadDim = 512;  // of q and k, and of v, which are multiples of kHeadDimMultiple
constexpr int64_t kHeadDimMultiple = 8;
constexpr int64_t kUnlimited = -1;  // of a window

// An input that is broadcast to [B, Hq, Sq, Sk]: a stride is 0 where its dimension is 1. Null data: absent. The dtype
// of a mask has no meaning: its elements are bool, one byte each.
struct ScoreTensor {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t query_stride = 0;
  int64_t key_stride = 0;

  INLAY_HOST_DEVICE int64_t offset(int64_t batch, int64_t head, int64_t query, int64_t key) const {
    return batch * batch_stride + head * head_stride + query * query_stride + key * key_stride;
  }
};

// The gradient of a bias, dense and of the bias's own shape; a stride is 0 where its dimension is 1.
struct ScoreGradient {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::f32;
  int64_t sizes[4] = {0, 0, 0, 0};
};

// Keys [begin, end) of a sequence.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;

  INLAY_HOST_DEVICE bool empty() const { return end <= begin; }
};

// For each query the keys that it may see, [B, Sq, 2] int32 (begin and one past the end, counted from the first key of
// the query's sequence); the last dimension is dense and the batch stride 0 where all rows share it. Null data: absent.
// One range a query says: image blocks that see each other in an otherwise causal text, prefixes, chunks, padding on
// the left, packed positions; and it is 8 bytes a query whatever the number of heads, layers and keys.
struct KeyRanges {
  const int32_t* data = nullptr;
  int64_t batch_stride = 0;
  int64_t query_stride = 0;
};

// What the forward and the backward are given. T is q's dtype; "wide" is f32, or f64 where T is f64.
//
// Sequences of queries and of keys are numbered alike: sequence n is batch row n, or the n-th packed one. A query or a
// key is counted from the first of its sequence.
struct Inputs {
  Sequences queries;
  Sequences keys;  // of as many sequences
  int64_t batch = 0;
  int64_t query_heads = 0;  // Hq, a multiple of Hkv
  int64_t key_heads = 0;    // Hkv
  int64_t head_dim = 0;     // D
  int64_t value_dim = 0;    // DV
  TokenTensor q;            // [B, Sq, Hq, D] T
  TokenTensor k;            // [B, Sk, Hkv, D] T
  TokenTensor v;            // [B, Sk, Hkv, DV] T
  TokenTensor gate;         // [B, Sq, Hq, DV] T, or absent
  VectorTensor sinks;       // [Hq] T or wide, or absent
  ScoreTensor mask;         // never with packed sequences
  ScoreTensor bias;         // T or wide; never with packed sequences
  IndexTensor kv_lengths;   // [B], or absent; never with packed sequences
  KeyRanges key_ranges;
  Dropout dropout;
  double scale = 1.0;
  double softcap = 0.0;  // 0: none
  // Keys before and after the query's own, which is its number plus Sk - Sq of its sequence; kUnlimited or from 0.
  // Causal attention has none after.
  int64_t window_left = kUnlimited;
  int64_t window_right = kUnlimited;
  bool allow_tf32 = false;  // products of float32 values may round them to tf32

  INLAY_HOST_DEVICE int64_t group() const { return key_heads > 0 ? query_heads / key_heads : 1; }

  // How many keys of the sequence there are.
  INLAY_HOST_DEVICE int64_t key_count(int64_t sequence, const Sequence& keys_of_it) const {
    const int64_t count = keys_of_it.end - keys_of_it.begin;
    if (!kv_lengths.data) return count;
    const int64_t length = kv_lengths[sequence];
    return length < 0 ? 0 : length < count ? length : count;
  }

  // The keys that a query may see as far as its position says; mask and bias may hide more. `key_count` is the
  // function's result, `diagonal` is the sequence's Sk - Sq, and `query_row` its queries' begin plus the query.
  INLAY_HOST_DEVICE KeyRange visible(int64_t query, int64_t key_count, int64_t diagonal, int64_t batch,
                                     int64_t query_row) const {
    KeyRange range{0, key_count};
    const int64_t position = query + diagonal;
    if (window_left >= 0 && position - window_left > range.begin) range.begin = position - window_left;
    if (window_right >= 0 && position + window_right + 1 < range.end) range.end = position + window_right + 1;
    if (key_ranges.data) {
      const int32_t* own = key_ranges.data + batch * key_ranges.batch_stride + query_row * key_ranges.query_stride;
      if (own[0] > range.begin) range.begin = own[0];
      if (own[1] < range.end) range.end = own[1];
    }
    if (range.end < range.begin) range.end = range.begin;
    return range;
  }
};

struct ForwardParams {
  Inputs inputs;
  OutputTensor y;           // [B, Sq, Hq, DV] T: o, times sigmoid(gate) where there is a gate
  OutputTensor o;           // [B, Sq, Hq, DV] T: before the gate, or not wanted
  OutputTensor lse;         // [B, Hq, Sq] wide, or not wanted
  void* scratch = nullptr;  // scratch_bytes(), aligned to 256 bytes
};

struct BackwardParams {
  Inputs inputs;
  TokenTensor dout;           // [B, Sq, Hq, DV] T: the gradient of y
  VectorTensor dlse;          // [B, Hq, Sq] wide, contiguous, or absent: zeros
  TokenTensor o;              // [B, Sq, Hq, DV] T: before the gate
  VectorTensor lse;           // [B, Hq, Sq] wide, contiguous
  OutputTensor dq;            // [B, Sq, Hq, D] T
  OutputTensor dk;            // [B, Sk, Hkv, D] T
  OutputTensor dv;            // [B, Sk, Hkv, DV] T
  OutputTensor dgate;         // [B, Sq, Hq, DV] T, or not wanted
  OutputTensor dsinks;        // [Hq] as sinks, or not wanted
  ScoreGradient dbias;        // as bias, or not wanted
  bool deterministic = true;  // the same bits in every run
  void* scratch = nullptr;    // scratch_bytes(), aligned to 256 bytes
};

// Defined once per library: in attention/cpu/launch.cpp, and for CUDA where its kernels are. `stream` is null on the
// CPU. A case without kernels throws; python/inlay/ops/_attention_kernels.py knows which have some.
void forward(const ForwardParams& params, void* stream);
void backward(const BackwardParams& params, void* stream);
int64_t scratch_bytes(const ForwardParams& params);
int64_t scratch_bytes(const BackwardParams& params);

}  // namespace inlay::attention
