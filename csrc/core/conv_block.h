// The loops over pixels and taps of the depthwise convolution: blocks of outputs, channels in lanes, sums in registers.
#pragma once

#include "conv_tile.h"

namespace iumad::IUMAD_ISA {

// The kernel's size and stride, known at compile time except where rows = columns = 0 stands for any size.
template <int kRows, int kColumns, int kStep>
struct Kernel {
  static constexpr int kStride = kStep;
  int64_t any_rows, any_columns;
  int64_t rows() const { return kRows ? kRows : any_rows; }
  int64_t columns() const { return kRows ? kColumns : any_columns; }
  static constexpr bool kOneRow = kRows <= 1 && kStep == 1;  // may be a sequence's
  // What is worked on together, in registers: a piece of the kernel (all of it, a row, or a tap) and a block of outputs.
  static constexpr int kPieceRows = kRows == 3 ? 3 : 1, kPieceColumns = kRows ? kColumns : 1;
  static constexpr int kBlockRows = kRows == 3 && kStep == 1 ? 2 : 1, kBlockColumns = kOneRow && kRows ? 12 : kStep == 1 ? 7 : 4;
};

template <class Visitor>
inline void with_any_kernel(const DepthwiseConv2d& s, Visitor&& f) {
  if (s.stride == 1) return f(Kernel<0, 0, 1>{s.kernel_height, s.kernel_width});
  return f(Kernel<0, 0, 2>{s.kernel_height, s.kernel_width});
}

// Calls f with the Kernel; the common sizes of both ops are compiled with their loops unrolled.
template <class Visitor>
inline void with_kernel(const DepthwiseConv2d& s, Visitor&& f) {
  const auto is = [&](int64_t rows, int64_t columns, int64_t stride) {
    return s.kernel_height == rows && s.kernel_width == columns && s.stride == stride;
  };
  if (is(3, 3, 1)) return f(Kernel<3, 3, 1>{});
  if (is(3, 3, 2)) return f(Kernel<3, 3, 2>{});
  if (is(5, 5, 1)) return f(Kernel<5, 5, 1>{});
  if (is(5, 5, 2)) return f(Kernel<5, 5, 2>{});
  if (is(1, 2, 1)) return f(Kernel<1, 2, 1>{});
  if (is(1, 3, 1)) return f(Kernel<1, 3, 1>{});
  if (is(1, 4, 1)) return f(Kernel<1, 4, 1>{});
  with_any_kernel(s, f);
}

// Which taps count: all of them, or those whose token belongs to the same sequence. Asked with columns of the image.
struct AllTaps {
  bool operator()(int64_t, int64_t) const { return true; }
  bool skipped(int64_t) const { return false; }
};
struct SameSequence {
  const int32_t* number;
  int64_t length;
  bool operator()(int64_t token, int64_t other) const { return other >= 0 && other < length && number[token] == number[other]; }
  bool skipped(int64_t token) const { return number[token] < 0; }
};

template <class K, class Visitor>
inline void with_taps(const DepthwiseConv2d& s, const K&, int64_t batch, Visitor&& f) {
  if constexpr (K::kOneRow) {
    if (s.sequence) return f(SameSequence{s.sequence + batch * s.width, s.width});
  }
  f(AllTaps{});
}

// Rows and columns that exist: [top, bottom) x [left, right).
struct Bounds {
  int64_t top, bottom, left, right;
};

// The pixels that a block of outputs meets.
template <class F>
struct Window {
  const F* first;       // what the first output's first tap meets; it may be out of bounds
  int64_t row, column;  // strides
  Bounds bounds;        // of what exists, counted from the first

  Window(const Pixels<F>& in, const Bounds& b, int64_t r, int64_t c)
      : first(in.at(r, c)), row(in.row), column(in.column), bounds{b.top - r, b.bottom - r, b.left - c, b.right - c} {}
};

// Which of `count` rows or columns from `first` on lie in [from, to), as bits.
inline uint32_t existing(int64_t from, int64_t to, int64_t first, int count) {
  const int64_t begin = most(0, from - first), end = least(count, to - first);
  return end <= begin ? 0 : (uint32_t(1) << end) - (uint32_t(1) << begin);
}

// Calls use(o, t, i, j, x) for every output (o, t) of a block of kRows x kRun, tap (i, j) of kTapRows x kTapColumns and the pixel
// x both meet. Every pixel is loaded once; those that do not exist are left out.
template <int kStride, int kRows, int kRun, int kTapRows, int kTapColumns, class F, class Use>
inline void meet(const F* first, int64_t row, int64_t column, uint32_t rows, uint32_t columns, const Use& use) {
  constexpr int kWidth = (kRun - 1) * kStride + kTapColumns;
  static_assert(kWidth <= 16, "IUMAD_UNROLL unrolls this far: g++ 12 got a loop of 17 wrong");
  IUMAD_UNROLL
  for (int y = 0; y < (kRows - 1) * kStride + kTapRows; ++y) {
    if (!(rows & (uint32_t(1) << y))) continue;
    const F* p = first + y * row;
    IUMAD_UNROLL
    for (int x = 0; x < kWidth; ++x, p += column) {
      if (!(columns & (uint32_t(1) << x))) continue;
      const Vec<F> value = load(p);
      IUMAD_UNROLL
      for (int o = 0; o < kRows; ++o) {
        IUMAD_UNROLL
        for (int t = 0; t < kRun; ++t) {
          const int i = y - o * kStride, j = x - t * kStride;
          if (i >= 0 && i < kTapRows && j >= 0 && j < kTapColumns) use(o, t, i, j, value);
        }
      }
    }
  }
}

// sums[o][t][lane] = bias + the taps of a block of outputs, for one vector of channels; `offset` leads to it from the window's.
// Sequences ask for tokens: the first output's, and the one its first tap meets.
template <class K, int kRows, int kRun, class F, class Taps>
[[gnu::noinline]] void sum_block(const K& kernel, const Window<F>& in, int64_t offset, const F* weight, const F* bias,
                                 const Taps& taps, int64_t token, int64_t other, F* sums) {
  constexpr int V = kLanes<F>, kStride = K::kStride, kTapRows = K::kPieceRows, kTapColumns = K::kPieceColumns;
  Vec<F> sum[kRows][kRun];
  IUMAD_UNROLL
  for (int o = 0; o < kRows; ++o) {
    IUMAD_UNROLL
    for (int t = 0; t < kRun; ++t) sum[o][t] = load(bias);
  }
  for (int64_t j0 = 0; j0 < kernel.columns(); j0 += kTapColumns) {
    const uint32_t columns = existing(in.bounds.left, in.bounds.right, j0, (kRun - 1) * kStride + kTapColumns);
    for (int64_t i0 = 0; i0 < kernel.rows(); i0 += kTapRows) {
      const uint32_t rows = existing(in.bounds.top, in.bounds.bottom, i0, (kRows - 1) * kStride + kTapRows);
      Vec<F> w[kTapRows * kTapColumns];
      IUMAD_UNROLL
      for (int k = 0; k < kTapRows * kTapColumns; ++k) w[k] = load(weight + (i0 * kernel.columns() + j0 + k) * V);
      meet<kStride, kRows, kRun, kTapRows, kTapColumns>(in.first + offset + i0 * in.row + j0 * in.column, in.row, in.column, rows,
                                                        columns, [&](int o, int t, int i, int j, Vec<F> x) {
                                                          if (taps(token + t, other + t + j0 + j))
                                                            sum[o][t] = fma(w[i * kTapColumns + j], x, sum[o][t]);
                                                        });
    }
  }
  IUMAD_UNROLL
  for (int o = 0; o < kRows; ++o) {
    IUMAD_UNROLL
    for (int t = 0; t < kRun; ++t) store<F>(sums + (o * kRun + t) * V, sum[o][t]);
  }
}

// Calls f<kRun>(first) for runs that cover [0, n): as many of kMost as fit, then of kMost / 2, ...
template <int kMost, class Visitor>
inline void for_runs(int64_t n, Visitor&& f) {
  int64_t i = 0;
  for (; i + kMost <= n; i += kMost) f(std::integral_constant<int, kMost>{}, i);
  if constexpr (kMost > 1) {
    if (i < n) for_runs<kMost / 2>(n - i, [&](auto run, int64_t first) { f(run, i + first); });
  }
}

// Calls f(rows, columns, r, c), rows and columns known at compile time, for blocks that cover the rectangle.
template <int kRows, int kColumns, class Visitor>
inline void for_blocks(const Rect& out, Visitor&& f) {
  const int64_t bottom = out.row + out.rows;
  for (int64_t r = out.row, rows; r < bottom; r += rows) {
    rows = least(kRows, bottom - r);
    for_runs<kColumns>(out.columns, [&](auto columns, int64_t start) {
      if constexpr (kRows > 1 && columns == kColumns) {
        if (rows == kRows) return f(std::integral_constant<int, kRows>{}, columns, r, out.column + start);
      }
      for (int64_t i = 0; i < rows; ++i) f(std::integral_constant<int, 1>{}, columns, r + i, out.column + start);
    });
  }
}

// finish(r, c, n, sums, run) for every vector n of channels and run (its length, a constant) of outputs from (r, c) on: bias +
// the taps on `in`, where tap (i, j) of output (r, c) meets pixel (r stride - up + i, c stride - before + j).
template <class F, class K, class Taps, class Finish>
inline void convolve(const Pixels<F>& in, const Bounds& bounds, const K& kernel, int64_t up, int64_t before, const F* weight,
                     const F* bias, const Rect& out, int vectors, bool far, const Taps& taps, const Finish& finish) {
  constexpr int V = kLanes<F>, kStride = K::kStride;
  // Past the rows that this block's kernel reads, or past its columns.
  const int64_t further = ahead(in, out, kernel.rows() - up, K::kBlockColumns * kStride, far);
  for_blocks<K::kBlockRows, K::kBlockColumns>(out, [&](auto rows, auto columns, int64_t r, int64_t c) {
    constexpr int kRows = decltype(rows)::value, kRun = decltype(columns)::value;
    const Window<F> window(in, bounds, r * kStride - up, c * kStride - before);
    alignas(kVectorBytes) F sums[kRows * kRun * V];
    for (int n = 0; n < vectors; ++n) {
      sum_block<K, kRows, kRun>(kernel, window, n * in.vector, weight + n * kernel.rows() * kernel.columns() * V, bias + n * V,
                                taps, c, c * kStride - before, sums);
      // What the next block reads: asked for while the results are made of the sums, which takes no memory.
      const F* next = in.at(r * kStride, c * kStride) + n * in.vector + further;
      IUMAD_UNROLL for (int y = 0; y < kRows * kStride; ++y) fetch_run<kRun * kStride, 0>(next + y * in.row, in.column);
      for (int o = 0; o < kRows; ++o) finish(r + o, c, n, sums + o * kRun * V, columns);
    }
  });
}

// What the gradients of inputs and of taps are made of. Both meet the same pixels of dz: dx = sum of weight times dz, and
// dw += x times dz. Tap (i, j) of input (r, c) meets dz (r - rows of the kernel + 1 + i, c - columns of the kernel + 1 + j).
template <class F>
struct Gradients {
  Pixels<F> dz, x, dx;
  Bounds bounds;         // of dz
  const F* weight;       // [vector][tap][lane], vectors `plane` values apart
  F* dw;                 // the same
  int64_t plane, token;  // token: of column 0 of x
  int64_t further;       // to the dx that the next run writes
};

template <class K, int kRun, class F, class Taps>
[[gnu::noinline]] void differentiate_run(const K& kernel, const Gradients<F>& d, int64_t r, int64_t c, int n, const Taps& taps) {
  constexpr int V = kLanes<F>, kTaps = K::kPieceColumns;
  const int64_t top = r - kernel.rows() + 1, left = c - kernel.columns() + 1;
  const F *x_run = d.x.at(r, c) + n * d.x.vector, *dz_run = d.dz.at(top, left) + n * d.dz.vector;
  Vec<F> x[kRun], dx[kRun];
  IUMAD_UNROLL
  for (int t = 0; t < kRun; ++t) {
    x[t] = load(x_run + t * d.x.column);
    dx[t] = Vec<F>{};
  }
  for (int64_t j0 = 0; j0 < kernel.columns(); j0 += kTaps) {
    const uint32_t columns = existing(d.bounds.left, d.bounds.right, left + j0, kRun - 1 + kTaps);
    for (int64_t i = most(0, d.bounds.top - top); i < least(kernel.rows(), d.bounds.bottom - top); ++i) {
      const int64_t first = n * d.plane + (i * kernel.columns() + j0) * V;
      Vec<F> w[kTaps], dw[kTaps];
      IUMAD_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        w[j] = load(d.weight + first + j * V);
        dw[j] = load(d.dw + first + j * V);
      }
      meet<1, 1, kRun, 1, kTaps>(dz_run + i * d.dz.row + j0 * d.dz.column, 0, d.dz.column, 1, columns,
                                 [&](int, int t, int, int j, Vec<F> g) {
                                   if (!taps(d.token + c + t, left + t + j0 + j)) return;
                                   dx[t] = fma(w[j], g, dx[t]);
                                   dw[j] = fma(x[t], g, dw[j]);
                                 });
      IUMAD_UNROLL
      for (int j = 0; j < kTaps; ++j) store<F>(d.dw + first + j * V, dw[j]);
    }
  }
  F* dx_run = d.dx.at(r, c) + n * d.dx.vector;
  fetch_run<kRun, 1>(dx_run + d.further, d.dx.column);
  IUMAD_UNROLL
  for (int t = 0; t < kRun; ++t) store<F>(dx_run + t * d.dx.column, dx[t]);
}

template <class F, class K, class Taps>
inline void differentiate(const K& kernel, const Gradients<F>& d, const Rect& inputs, int vectors, const Taps& taps) {
  for_blocks<1, K::kBlockColumns>(inputs, [&](auto, auto columns, int64_t r, int64_t c) {
    for (int n = 0; n < vectors; ++n) differentiate_run<K, decltype(columns)::value>(kernel, d, r, c, n, taps);
  });
}

}  // namespace iumad::IUMAD_ISA
