// What the passes of the depthwise convolution share: tiles of pixels in scratch memory, channels in lanes, and the sum over
// taps.
#pragma once

#include "block.h"
#include "depthwise_conv2d.h"
#include "math.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Rect {
  int64_t row, column, rows, columns;
  int64_t pixels() const { return rows * columns; }
};

// Neighbouring channels of one image, in whole vectors or, at the end, as one partial vector.
struct Chunk {
  int64_t batch, channel;
  int64_t channels;

  template <class F>
  int vectors() const {
    return int((channels + kLanes<F> - 1) / kLanes<F>);
  }
  template <class F>
  bool whole() const {
    return channels % kLanes<F> == 0;
  }
};

// Calls f<kRun>(first) for runs that cover [0, n): as many of kMost as fit, then of kMost / 2, ...
template <int kMost, class Visitor>
inline void for_runs(int64_t n, Visitor&& f) {
  int64_t i = 0;
  for (; i + kMost <= n; i += kMost) f(std::integral_constant<int, kMost>{}, i);
  if constexpr (kMost > 1) {
    if (i < n) for_runs<kMost / 2>(n - i, [&](auto run, int64_t first) { f(run, i + first); });
  }
}

inline int64_t pixel(const GridView& v, const Chunk& k, int64_t row, int64_t column) {
  return k.batch * v.batch + k.channel * v.channel + row * v.row + column * v.column;
}

// Calls f(element offset, scratch pixel, pixels) for stretches of the rectangle whose pixels have one stride: all or its rows.
template <class Visitor>
inline void for_stretches(const GridView& v, const Chunk& k, const Rect& r, Visitor&& f) {
  if (v.row == r.columns * v.column) return f(pixel(v, k, r.row, r.column), int64_t(0), r.pixels());
  for (int64_t i = 0; i < r.rows; ++i) f(pixel(v, k, r.row + i, r.column), i * r.columns, r.columns);
}

inline void fill_offsets(int64_t* offset, int64_t count, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) offset[i] = i * stride;
}

inline void* element(const GridView& v, int64_t offset) { return static_cast<char*>(v.data) + offset * size_of(v.dtype); }

// dst[vector][pixel][lane] (vectors are `plane` values apart) = `pixels` pixels whose channels have stride 1.
template <class F>
inline void load_channels_last(F* dst, int64_t plane, const GridView& v, int64_t offset, const Chunk& k, int64_t pixels) {
  constexpr int V = kLanes<F>;
  const int whole = int(k.channels / V), rest = int(k.channels % V);
  visit<F>(v.dtype, v.data, [&](const auto* p) {
    p += offset;
    for (int64_t i = 0; i < pixels; ++i, p += v.column, dst += V) {
      for (int n = 0; n < whole; ++n) store<F>(dst + n * plane, load_lanes(p + n * V));
      if (rest) {
        F last[V] = {};
        for (int lane = 0; lane < rest; ++lane) last[lane] = to_compute(p[whole * V + lane]);
        store<F>(dst + whole * plane, load(last));
      }
    }
  });
}

template <class F>
inline void store_channels_last(const F* src, int64_t plane, const GridView& v, int64_t offset, const Chunk& k, int64_t pixels) {
  constexpr int V = kLanes<F>;
  const int whole = int(k.channels / V), rest = int(k.channels % V);
  visit<F>(v.dtype, v.data, [&](auto* p) {
    using T = std::remove_reference_t<decltype(*p)>;
    p += offset;
    for (int64_t i = 0; i < pixels; ++i, p += v.column, src += V) {
      for (int n = 0; n < whole; ++n) store_lanes(p + n * V, load(src + n * plane));
      for (int lane = 0; lane < rest; ++lane) p[whole * V + lane] = from_compute<T>(src[whole * plane + lane]);
    }
  });
}

// The planes of a rectangle inside the image; in any other layout blocks of channels x pixels are transposed.
template <class F>
void load_rect(F* dst, int64_t plane, const GridView& v, const Chunk& k, const Rect& r, int64_t* offset) {
  if (v.channel != 1) fill_offsets(offset, r.pixels(), v.column);
  for_stretches(v, k, r, [&](int64_t first, int64_t i, int64_t pixels) {
    F* start = dst + i * kLanes<F>;
    if (v.channel == 1) return load_channels_last<F>(start, plane, v, first, k, pixels);
    for (int n = 0; n < k.vectors<F>(); ++n) {
      load_block<F>(start + n * plane, element(v, first + n * kLanes<F> * v.channel), v.dtype, offset, pixels, v.channel,
                    int(least(kLanes<F>, k.channels - n * kLanes<F>)));
    }
  });
}

template <class F>
void store_rect(const F* src, int64_t plane, const GridView& v, const Chunk& k, const Rect& r, int64_t* offset) {
  if (v.channel != 1) fill_offsets(offset, r.pixels(), v.column);
  for_stretches(v, k, r, [&](int64_t first, int64_t i, int64_t pixels) {
    const F* start = src + i * kLanes<F>;
    if (v.channel == 1) return store_channels_last<F>(start, plane, v, first, k, pixels);
    for (int n = 0; n < k.vectors<F>(); ++n) {
      store_block<F>(start + n * plane, element(v, first + n * kLanes<F> * v.channel), v.dtype, offset, pixels, v.channel,
                     int(least(kLanes<F>, k.channels - n * kLanes<F>)));
    }
  });
}

template <class F>
inline void clear_pixels(F* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store<F>(dst + i * kLanes<F>, Vec<F>{});
}

// Pixels as the loops below see them, by their row and column in the image: a tensor itself, or a tile of it in scratch.
template <class F>
struct Pixels {
  F* first;
  int64_t row, column, vector;  // strides
  int64_t first_row, first_column;

  F* at(int64_t r, int64_t c) const { return first + (r - first_row) * row + (c - first_column) * column; }
};

template <class F>
inline Pixels<F> in_scratch(F* first, int64_t plane, const Rect& r) {
  return {first, r.columns * kLanes<F>, kLanes<F>, plane, r.row, r.column};
}

// Whether the tensor can be read and written where it is: elements of the compute type, channels side by side.
template <class F>
inline bool in_place(const GridView& v) {
  return v.channel == 1 && v.dtype == (sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32);
}

template <class F>
inline Pixels<F> tensor_pixels(const GridView& v, const Chunk& k) {
  return {static_cast<F*>(v.data) + pixel(v, k, 0, 0), v.row, v.column, kLanes<F>, 0, 0};
}

// The kernel's size and stride, known at compile time except where rows = columns = 0 stands for any size.
template <int kRows, int kColumns, int kStep>
struct Kernel {
  static constexpr int kStride = kStep;
  int64_t any_rows, any_columns;
  int64_t rows() const { return kRows ? kRows : any_rows; }
  int64_t columns() const { return kRows ? kColumns : any_columns; }
  static constexpr bool kOneRow = kRows <= 1 && kStep == 1;  // may be a sequence's
  // Outputs of a row and taps of a kernel row that are worked on together, in registers.
  static constexpr int kRun = kStep == 1 ? 7 : 4, kColumnRun = kRows ? kColumns : 1;
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

// The same kernel with stride 1: the gradient of the input is a plain convolution of the spread out dz.
template <int kRows, int kColumns, int kStep>
inline Kernel<kRows, kColumns, 1> unit_stride(const Kernel<kRows, kColumns, kStep>& k) {
  return {k.any_rows, k.any_columns};
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

// Which of the next `count` columns from `first` on exist, as bits.
inline uint32_t existing(const Bounds& b, int64_t first, int count) {
  const int64_t from = most(0, b.left - first), to = least(count, b.right - first);
  return to <= from ? 0 : (uint32_t(1) << to) - (uint32_t(1) << from);
}

// Slides kTaps taps over kRun outputs that are kStride apart, one row of both: use(t, j, x) for output t, tap j and the pixel
// both meet at. Every pixel is loaded once; those that do not exist are 0.
template <int kStride, int kRun, int kTaps, class F, class Use>
inline void slide(const F* p, int64_t column, uint32_t exist, const Use& use) {
  IUMAD_UNROLL
  for (int q = 0; q < (kRun - 1) * kStride + kTaps; ++q, p += column) {
    Vec<F> x{};
    if (exist & (uint32_t(1) << q)) x = load(p);
    IUMAD_UNROLL
    for (int j = 0; j < kTaps; ++j)
      if (q >= j && (q - j) % kStride == 0 && (q - j) / kStride < kRun) use((q - j) / kStride, j, x);
  }
}

// finish(r, c, n, sum) for every output pixel and vector of channels: bias (may be null) + the taps on `in`, whose row for output
// row r and kernel row i is r * stride - up + i. Taps out of bounds meet 0. counts(c, j): whether kernel column j counts for
// column c.
template <class F, class K, class Counts, class Finish>
inline void convolve(const Pixels<F>& in, const Bounds& bounds, const K& kernel, int64_t up, int64_t before, const F* weight,
                     const F* bias, const Rect& out, int vectors, const Counts& counts, const Finish& finish) {
  constexpr int V = kLanes<F>, kStride = K::kStride;
  const int64_t taps_per_vector = kernel.rows() * kernel.columns();
  for (int64_t r = out.row; r < out.row + out.rows; ++r) {
    const int64_t top = r * kStride - up;
    const int64_t i_from = most(0, bounds.top - top), i_to = least(kernel.rows(), bounds.bottom - top);
    for_runs<K::kRun>(out.columns, [&](auto run, int64_t start) {
      constexpr int kRun = decltype(run)::value;
      const int64_t c = out.column + start, first = c * kStride - before;
      for (int n = 0; n < vectors; ++n) {
        Vec<F> sum[kRun];
        IUMAD_UNROLL
        for (int t = 0; t < kRun; ++t) sum[t] = bias ? load(bias + n * V) : Vec<F>{};
        for (int64_t i = i_from; i < i_to; ++i) {
          for (int64_t j0 = 0; j0 < kernel.columns(); j0 += K::kColumnRun) {
            const F* w = weight + (n * taps_per_vector + i * kernel.columns() + j0) * V;
            const uint32_t exist = existing(bounds, first + j0, (kRun - 1) * kStride + K::kColumnRun);
            slide<kStride, kRun, K::kColumnRun>(in.at(top + i, first + j0) + n * in.vector, in.column, exist,
                                                [&](int t, int j, Vec<F> x) {
                                                  if (counts(c + t, j0 + j)) sum[t] = fma(load(w + j * V), x, sum[t]);
                                                });
          }
        }
        IUMAD_UNROLL
        for (int t = 0; t < kRun; ++t) finish(r, c + t, n, sum[t]);
      }
    });
  }
}

// dw[n][tap] += sum over the output pixels of dz times the tap's x; dz lies at the outputs' rows and columns times the stride.
template <class F, class K, class Counts>
inline void correlate(const Pixels<F>& dz, const Pixels<F>& x, const Bounds& bounds, const K& kernel, int64_t up, int64_t before,
                      const Rect& out, int vectors, const Counts& counts, F* dw) {
  constexpr int V = kLanes<F>, kStride = K::kStride, kTaps = K::kColumnRun;
  const int64_t taps_per_vector = kernel.rows() * kernel.columns();
  for (int64_t r = out.row; r < out.row + out.rows; ++r) {
    const int64_t top = r * kStride - up;
    const int64_t i_from = most(0, bounds.top - top), i_to = least(kernel.rows(), bounds.bottom - top);
    for_runs<K::kRun>(out.columns, [&](auto run, int64_t start) {
      constexpr int kRun = decltype(run)::value;
      const int64_t c = out.column + start, first = c * kStride - before;
      for (int n = 0; n < vectors; ++n) {
        Vec<F> gradient[kRun];
        const F* g = dz.at(r * kStride, c * kStride) + n * dz.vector;
        IUMAD_UNROLL
        for (int t = 0; t < kRun; ++t, g += kStride * dz.column) gradient[t] = load(g);
        for (int64_t i = i_from; i < i_to; ++i) {
          for (int64_t j0 = 0; j0 < kernel.columns(); j0 += kTaps) {
            F* total = dw + (n * taps_per_vector + i * kernel.columns() + j0) * V;
            Vec<F> sum[kTaps];
            IUMAD_UNROLL
            for (int j = 0; j < kTaps; ++j) sum[j] = load(total + j * V);
            const uint32_t exist = existing(bounds, first + j0, (kRun - 1) * kStride + kTaps);
            slide<kStride, kRun, kTaps>(x.at(top + i, first + j0) + n * x.vector, x.column, exist, [&](int t, int j, Vec<F> v) {
              if (counts(c + t, j0 + j)) sum[j] = fma(gradient[t], v, sum[j]);
            });
            IUMAD_UNROLL
            for (int j = 0; j < kTaps; ++j) store<F>(total + j * V, sum[j]);
          }
        }
      }
    });
  }
}

}  // namespace iumad::IUMAD_ISA
