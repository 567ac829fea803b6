// Rows of a strided tensor to and from dense, zero-padded scratch: dst[row][column], rows `ld` apart.
#pragma once

#include "convert.h"

namespace iumad::IUMAD_ISA {

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Elements between two rows of n elements: whole cache lines, and no power of two of them, which would put a column of a block
// into a few cache sets.
template <class T>
inline int64_t row_length(int64_t n) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  const int64_t lines = (n + line - 1) / line;
  return (lines % 8 == 0 && lines > 0 ? lines + 1 : lines) * line;
}

constexpr int64_t kPrefetchRows = 24;

// A matrix somewhere in a tensor; strides in elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t rows, columns, row_stride, column_stride;
};

// Fills dst[padded_rows][padded_columns]; what lies outside the source becomes 0. T is the compute type, or BFloat16 for
// bfloat16 sources.
template <class T>
inline void load_rows(T* dst, int64_t ld, int64_t padded_rows, int64_t padded_columns, const Rows& source) {
  using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
  visit<F>(source.dtype, source.data, [&](auto* p) {
    using S = std::remove_pointer_t<decltype(p)>;
    for (int64_t i = 0; i < source.rows; ++i) {
      const S* from = p + i * source.row_stride;
      T* to = dst + i * ld;
      int64_t j = 0;
      if (source.column_stride == 1) {
        // Rows of a head lie far apart, out of the hardware prefetcher's sight.
        for (int64_t k = 0; k < source.columns; k += 64 / int64_t(sizeof(S)))
          __builtin_prefetch(from + kPrefetchRows * source.row_stride + k);
        if constexpr (std::is_same_v<S, T>) {
          constexpr int64_t n = kVectorBytes / int64_t(sizeof(T));
          for (; j + n <= source.columns; j += n) std::memcpy(to + j, from + j, kVectorBytes);
        } else if constexpr (std::is_same_v<T, F>) {
          for (; j + kLanes<F> <= source.columns; j += kLanes<F>) store<F>(to + j, load_lanes(from + j));
        }
      }
      for (; j < source.columns; ++j) {
        if constexpr (std::is_same_v<S, T>) {
          to[j] = from[j * source.column_stride];
        } else {
          to[j] = from_compute<T>(to_compute(from[j * source.column_stride]));
        }
      }
      if (j < padded_columns) std::memset(static_cast<void*>(to + j), 0, size_t(padded_columns - j) * sizeof(T));
    }
    for (int64_t i = source.rows; i < padded_rows; ++i)
      std::memset(static_cast<void*>(dst + i * ld), 0, size_t(padded_columns) * sizeof(T));
  });
}

// target[i][j] = factor(i) * src[i][j].
template <class F, class Factor>
inline void store_rows(const F* src, int64_t ld, const Rows& target, Factor&& factor) {
  visit<F>(target.dtype, target.data, [&](auto* p) {
    using T = std::remove_pointer_t<decltype(p)>;
    for (int64_t i = 0; i < target.rows; ++i) {
      const F* from = src + i * ld;
      const F scale = factor(i);
      T* to = p + i * target.row_stride;
      int64_t j = 0;
      if (target.column_stride == 1)
        for (; j + kLanes<F> <= target.columns; j += kLanes<F>) store_lanes(to + j, load(from + j) * broadcast(scale));
      for (; j < target.columns; ++j) to[j * target.column_stride] = from_compute<T>(scale * from[j]);
    }
  });
}

// dst[j][i] = src[i][j] for rows x columns values, both multiples of the lanes of F (32-bit or 64-bit units, moved untouched).
template <class F>
inline void transpose_rows(F* dst, int64_t ld_dst, const F* src, int64_t ld_src, int64_t rows, int64_t columns) {
  constexpr int V = kLanes<F>;
  for (int64_t i = 0; i < rows; i += V) {
    for (int64_t j = 0; j < columns; j += V) {
      Vec<F> block[V];
      IUMAD_UNROLL for (int k = 0; k < V; ++k) block[k] = load(src + (i + k) * ld_src + j);
      transpose<F>(block);
      IUMAD_UNROLL for (int k = 0; k < V; ++k) store<F>(dst + (j + k) * ld_dst + i, block[k]);
    }
  }
}

// Brings rows near before they are needed: those that the next task will load and those that this one will store, a few after
// every tile of a product, in proportion to its work. A head's rows lie far apart in memory; without this every one would be
// waited for, and many at a time would wait for each other.
class Prefetcher {
 public:
  void clear() { count_ = 0, item_at_ = 0, row_at_ = 0, total_ = 0, due_ = 0, rate_ = 0; }
  void add(const Rows& rows, bool to_store = false) {
    if (rows.column_stride != 1 || rows.rows * rows.columns * size_of(rows.dtype) > kMostBytes || rows.rows == 0) return;
    item_[count_++] = {rows, to_store};
    total_ += rows.rows;
  }
  void spread(int64_t work) { rate_ = (total_ << kFraction) / (work > 0 ? work : 1); }
  void step(int64_t work) {
    due_ += work * rate_;
    for (int rows = 0; rows < kMostRows && due_ >> kFraction > 0; ++rows, due_ -= int64_t(1) << kFraction) fetch_row();
  }

 private:
  void fetch_row() {
    if (item_at_ == count_) return;
    const Item& item = item_[item_at_];
    const int64_t bytes = item.rows.columns * size_of(item.rows.dtype);
    const char* p = static_cast<const char*>(item.rows.data) + row_at_ * item.rows.row_stride * size_of(item.rows.dtype);
    if (item.to_store) {
      for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(p + k, 1, 2);
    } else {
      for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(p + k, 0, 2);
    }
    if (++row_at_ == item.rows.rows) ++item_at_, row_at_ = 0;
  }

  static constexpr int64_t kMostBytes = 256 * 1024;
  static constexpr int kFraction = 32, kMostRows = 6;
  struct Item {
    Rows rows;
    bool to_store;
  };
  Item item_[8];
  int count_ = 0, item_at_ = 0;  // the next row to fetch
  int64_t row_at_ = 0, total_ = 0;
  int64_t due_ = 0, rate_ = 0;  // rows, and rows per unit of work, in units of 2^-kFraction
};

}  // namespace iumad::IUMAD_ISA
