// One row of a tensor, read or written a vector at a time, whatever its dtype.
//
// The dtype is either a template argument (float, double, bf16, f16) or `Any`: then the tensor says it at run time,
// at the price of a branch per vector. Kernels are written once over that argument; their common combinations of
// dtypes get an instance of their own, and all others share the one with `Any`.
#pragma once

#include "common/cpu/elements.h"
#include "common/rows.h"

namespace inlay::cpu {
namespace {

struct Any {};

// Any, but vectors of doubles know no other type than double.
template <class Scalar>
struct AnyFor {
  using type = Any;
};
template <>
struct AnyFor<double> {
  using type = double;
};

// The value that storing v as T and loading it again gives.
template <class Vec, class T>
struct Rounder {
  explicit Rounder(DType) {}
  INLAY_INLINE Vec operator()(Vec v) const { return Vec::round(v, T{}); }
};
template <class Vec>
struct Rounder<Vec, typename Vec::Scalar> {
  explicit Rounder(DType) {}
  INLAY_INLINE Vec operator()(Vec v) const { return v; }
};
template <class Vec>
struct Rounder<Vec, Any> {
  DType dtype;
  explicit Rounder(DType dtype) : dtype(dtype) {}
  [[gnu::noinline]] Vec operator()(Vec v) const {
    if (dtype == DType::bf16) return Vec::round(v, bf16{});
    if (dtype == DType::f16) return Vec::round(v, f16{});
    return v;
  }
};

template <class Vec, class T>
class RowReader {
 public:
  INLAY_INLINE RowReader(const RowTensor& tensor, int64_t row)
      : data_(static_cast<const T*>(tensor.data) + tensor.layout.offset(row)) {}
  template <class Lanes>
  INLAY_INLINE Vec load(int64_t i, Lanes lanes) const {
    return Vec::load(data_ + i, lanes);
  }
  // A hint, harmless beyond the row. While one row is worked on in the cache, memory would stand idle without it.
  INLAY_INLINE void prefetch(int64_t i) const { __builtin_prefetch(data_ + i); }

 private:
  const T* data_;
};

template <class Vec>
class RowReader<Vec, Any> {
 public:
  INLAY_INLINE RowReader(const RowTensor& tensor, int64_t row)
      : data_(tensor.data), offset_(tensor.layout.offset(row)), dtype_(tensor.dtype) {}
  // Out of line, here and below: being many, the calls would take most of the time to compile a kernel.
  template <class Lanes>
  [[gnu::noinline]] Vec load(int64_t i, Lanes lanes) const {
    if (dtype_ == DType::bf16) return Vec::load(static_cast<const bf16*>(data_) + offset_ + i, lanes);
    if (dtype_ == DType::f16) return Vec::load(static_cast<const f16*>(data_) + offset_ + i, lanes);
    return Vec::load(static_cast<const float*>(data_) + offset_ + i, lanes);
  }
  INLAY_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(static_cast<const char*>(data_) + (offset_ + i) * size_of(dtype_));
  }

 private:
  const void* data_;
  int64_t offset_;
  DType dtype_;
};

// Whether rows of `width` elements starting at `data` can be streamed: every vector must be aligned.
template <class Vec, class T>
INLAY_INLINE bool can_stream(const void* data, int64_t width) {
  return width % Vec::lanes == 0 && reinterpret_cast<uintptr_t>(data) % (Vec::lanes * sizeof(T)) == 0;
}

// `stream` asks for stores past the caches. For outputs larger than these: an ordinary store would first read what it
// overwrites, and push out what other code still needs.
template <class Vec, class T>
class RowWriter {
 public:
  INLAY_INLINE RowWriter(const OutputTensor& tensor, int64_t row, int64_t width, bool stream)
      : data_(static_cast<T*>(tensor.data) + row * width), stream_(stream && can_stream<Vec, T>(tensor.data, width)) {}
  INLAY_INLINE void store(int64_t i, Vec v, Full lanes) const {
    if (stream_) {
      Vec::stream(data_ + i, v);
    } else {
      Vec::store(data_ + i, v, lanes);
    }
  }
  INLAY_INLINE void store(int64_t i, Vec v, Partial lanes) const { Vec::store(data_ + i, v, lanes); }

 private:
  T* data_;
  bool stream_;
};

template <class Vec>
class RowWriter<Vec, Any> {
 public:
  INLAY_INLINE RowWriter(const OutputTensor& tensor, int64_t row, int64_t width, bool)
      : data_(tensor.data), offset_(row * width), dtype_(tensor.dtype) {}
  template <class Lanes>
  [[gnu::noinline]] void store(int64_t i, Vec v, Lanes lanes) const {
    if (dtype_ == DType::bf16) {
      Vec::store(static_cast<bf16*>(data_) + offset_ + i, v, lanes);
    } else if (dtype_ == DType::f16) {
      Vec::store(static_cast<f16*>(data_) + offset_ + i, v, lanes);
    } else {
      Vec::store(static_cast<float*>(data_) + offset_ + i, v, lanes);
    }
  }

 private:
  void* data_;
  int64_t offset_;
  DType dtype_;
};

}  // namespace
}  // namespace inlay::cpu
