// What the passes of the depthwise convolution share: tiles of pixels, channels in lanes, in scratch memory or where they are.
#pragma once

#include "block.h"
#include "depthwise_conv2d.h"
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

// Whether tensors of so many inputs' and results' sizes are too large, together, to be in a core's share of the caches still.
inline bool are_far(const DepthwiseConv2d& s, int64_t inputs, int64_t results) {
  constexpr int64_t kNearBytes = int64_t(6) << 20;
  const int64_t pixels = inputs * s.height * s.width + results * s.out_height() * s.out_width();
  return s.batch * s.channels * pixels * size_of(s.x.dtype) > kNearBytes;
}

// From a pixel to the one that a loop over blocks of rows x columns comes to next, in a rectangle: below or, in a single row, to
// the right. Memory is asked for this far ahead, at most one cache line per result, for bursts would wait for each other. What is
// near is asked for where it is needed at once: asking ahead would take longer than waiting.
template <class F>
inline int64_t ahead(const Pixels<F>& p, const Rect& r, int64_t rows, int64_t columns, bool far) {
  if (!far) return 0;
  return r.rows > 1 ? rows * p.row : columns * p.column;
}

// Asks for a run of pixels, one line each.
template <int kRun, int kToStore, class F>
[[gnu::always_inline]] inline void fetch_run(const F* first, int64_t column) {
  IUMAD_UNROLL for (int t = 0; t < kRun; ++t) __builtin_prefetch(first + t * column, kToStore, 2);
}

template <class F>
inline Pixels<F> in_scratch(F* first, int64_t plane, const Rect& r) {
  return {first, r.columns * kLanes<F>, kLanes<F>, plane, r.row, r.column};
}

// Whether the tensor can be read and written where it is: elements of the compute type, channels side by side.
template <class F>
inline bool in_place(const GridView& v) {
  return v.channel == 1 && v.dtype == kDTypeOf<F>;
}

template <class F>
inline Pixels<F> tensor_pixels(const GridView& v, const Chunk& k) {
  return {static_cast<F*>(v.data) + pixel(v, k, 0, 0), v.row, v.column, kLanes<F>, 0, 0};
}

// Every step-th row and column of p from (row, column) on, counted from 0.
template <class F>
inline Pixels<F> every(const Pixels<F>& p, int64_t step, int64_t row, int64_t column) {
  return {p.at(row, column), p.row * step, p.column * step, p.vector, 0, 0};
}

}  // namespace iumad::IUMAD_ISA
