// How scratch memory is divided up between the steps.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "moe/cuda/general.h"
#include "moe/cuda/tile_sizes.h"
#include "moe/cuda/tiles.h"

namespace inlay::moe::cuda {

static_assert(kGeneralRows == kPaddedUnit);

// Parts at multiples of 256 bytes from the start, which may be null where only `bytes` is wanted.
class Parts {
 public:
  explicit Parts(void* memory) : start_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }
  void* take_bytes(int64_t size) {
    void* const part = start_ + bytes;
    bytes += divide_up(size, 256) * 256;
    return part;
  }

  PaddedRows take_padded_rows(const ExpertInputs& in) {
    PaddedRows padded;
    padded.unit = kPaddedUnit;
    padded.capacity = padded_capacity(in, padded.unit);
    if (padded.capacity > INT32_MAX) throw std::runtime_error("moe_experts: indices has too many elements for CUDA");
    padded.tokens = take<int32_t>(padded.capacity);
    padded.places = take<int32_t>(in.most_rows());
    padded.experts = take<int32_t>(padded.capacity / padded.unit);
    padded.units_before = take<int32_t>(in.experts + 1);
    padded.tiles_before = take<int32_t>(in.experts + 1);
    padded.tiles_taken = take<int32_t>(1);
    return padded;
  }

  int64_t bytes = 0;

 private:
  char* start_;
};

struct ForwardScratch : Parts {
  ForwardSteps steps;
  void* find_rows = nullptr;

  ForwardScratch(const ExpertForwardParams& p, void* memory) : Parts(memory) {
    const ExpertInputs& in = p.inputs;
    const int64_t size = size_of(in.x.dtype);
    steps.inputs = in;
    steps.rows = p.rows;
    steps.padded = take_padded_rows(in);
    steps.h = p.h.data;
    steps.a = take_bytes(steps.padded.capacity * in.intermediate * size);
    steps.results = take_bytes(steps.padded.capacity * in.hidden * size);
    find_rows = take_bytes(find_rows_scratch_bytes(in));
  }
};

struct BackwardScratch : Parts {
  BackwardSteps steps;
  void* h = nullptr;  // computed again; null: not needed
  void* bias_gradients = nullptr;

  BackwardScratch(const ExpertBackwardParams& p, int64_t part_width, void* memory) : Parts(memory) {
    const ExpertInputs& in = p.inputs;
    const int64_t size = size_of(in.x.dtype);
    steps.inputs = in;
    steps.rows = p.rows;
    steps.padded = take_padded_rows(in);
    steps.dy = p.dy;
    steps.dgate_up_proj = p.dgate_up_proj;
    steps.ddown_proj = p.ddown_proj;
    const int64_t capacity = steps.padded.capacity;
    if (p.ddown_proj.data) steps.a = take_bytes(capacity * in.intermediate * size);
    if (p.dx.data || p.dgate_up_proj.data || p.dgate_up_bias.data) {
      steps.dh = take_bytes(capacity * in.pre_activations() * size);
    }
    if (p.dweights.data) {
      steps.parts = divide_up(in.intermediate, part_width);
      steps.weight_parts = take<float>(steps.parts * capacity);
    }
    if (p.dx.data) steps.dx = take_bytes(capacity * in.hidden * size);
    steps.h = p.h.data;
    if (!p.h.data && needs_h()) h = take_bytes(in.most_rows() * in.pre_activations() * size);
    if (h) steps.h = h;
    bias_gradients = take_bytes(bias_gradients_scratch_bytes(p));
  }

  bool needs_h() const { return steps.a || steps.dh || steps.weight_parts; }
};

}  // namespace inlay::moe::cuda
