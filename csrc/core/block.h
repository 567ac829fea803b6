// Moves a block of (rows x channels) between a strided tensor and a dense buffer [row][lane] of the compute type, channels in
// lanes. Rows are tokens of a scan, pixels, or the states of a parameter matrix: whatever has its offsets listed.
#pragma once

#include "convert.h"

namespace iumad::IUMAD_ISA {

// +1 or -1 where the offsets run through consecutive addresses, else 0.
inline int unit_step(const int64_t* offset, int64_t count) {
  if (count < 2) return 0;
  const int64_t step = offset[1] - offset[0];
  if (step != 1 && step != -1) return 0;
  for (int64_t i = 2; i < count; ++i)
    if (offset[i] - offset[i - 1] != step) return 0;
  return int(step);
}

// dst[i][lane] = data[offset[i] + lane * channel_stride]; lanes from `lanes` on become 0. `step` is unit_step(offset, count).
template <class F>
inline void load_block(F* dst, void* data, DType dtype, const int64_t* offset, int64_t count, int64_t channel_stride, int lanes,
                       int step) {
  constexpr int V = kLanes<F>;
  visit<F>(dtype, data, [&](auto* p) {
    int64_t i = 0;
    if (lanes == V && channel_stride == 1) {
      for (; i < count; ++i) store<F>(dst + i * V, load_lanes(p + offset[i]));
    } else if (lanes == V && step != 0) {
      for (; i < count && V <= count; i += V) {  // channels are rows in memory: read them whole and transpose
        if (i + V > count) i = count - V;        // the last block overlaps the one before
        const auto* first = p + (step > 0 ? offset[i] : offset[i + V - 1]);
        Vec<F> row[V];
        IUMAD_UNROLL for (int lane = 0; lane < V; ++lane) row[lane] = load_lanes(first + lane * channel_stride);
        transpose<F>(row);
        IUMAD_UNROLL for (int j = 0; j < V; ++j) store<F>(dst + (i + j) * V, row[step > 0 ? j : V - 1 - j]);
      }
    }
    for (; i < count; ++i) {
      for (int lane = 0; lane < lanes; ++lane) dst[i * V + lane] = to_compute(p[offset[i] + lane * channel_stride]);
      for (int lane = lanes; lane < V; ++lane) dst[i * V + lane] = F(0);
    }
  });
}
template <class F>
inline void load_block(F* dst, void* data, DType dtype, const int64_t* offset, int64_t count, int64_t channel_stride, int lanes) {
  load_block<F>(dst, data, dtype, offset, count, channel_stride, lanes, unit_step(offset, count));
}

// data[offset[i] + lane * channel_stride] = src[i][lane] (or += where `accumulate`).
template <class F>
inline void store_block(const F* src, void* data, DType dtype, const int64_t* offset, int64_t count, int64_t channel_stride,
                        int lanes, bool accumulate, int step) {
  constexpr int V = kLanes<F>;
  visit<F>(dtype, data, [&](auto* p) {
    using T = std::remove_reference_t<decltype(*p)>;
    int64_t i = 0;
    if (lanes == V && channel_stride == 1) {
      for (; i < count; ++i) {
        Vec<F> v = load(src + i * V);
        if (accumulate) v += load_lanes(p + offset[i]);
        store_lanes(p + offset[i], v);
      }
    } else if (lanes == V && step != 0) {
      for (; i < count && V <= count; i += V) {
        if (i + V > count) {  // the last block overlaps the one before, unless that would add twice
          if (accumulate) break;
          i = count - V;
        }
        auto* first = p + (step > 0 ? offset[i] : offset[i + V - 1]);
        Vec<F> row[V];
        IUMAD_UNROLL for (int j = 0; j < V; ++j) row[step > 0 ? j : V - 1 - j] = load(src + (i + j) * V);
        transpose<F>(row);
        IUMAD_UNROLL for (int lane = 0; lane < V; ++lane) {
          T* q = first + lane * channel_stride;
          store_lanes(q, accumulate ? row[lane] + load_lanes(q) : row[lane]);
        }
      }
    }
    for (; i < count; ++i) {
      for (int lane = 0; lane < lanes; ++lane) {
        T* q = p + offset[i] + lane * channel_stride;
        *q = from_compute<T>(accumulate ? F(to_compute(*q)) + src[i * V + lane] : src[i * V + lane]);
      }
    }
  });
}
template <class F>
inline void store_block(const F* src, void* data, DType dtype, const int64_t* offset, int64_t count, int64_t channel_stride,
                        int lanes, bool accumulate = false) {
  store_block<F>(src, data, dtype, offset, count, channel_stride, lanes, accumulate, unit_step(offset, count));
}

}  // namespace iumad::IUMAD_ISA
