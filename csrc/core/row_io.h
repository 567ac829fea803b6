// Rows between strided tensors of any element type and contiguous lanes of the compute type.
#pragma once

#include "convert.h"
#include "row_view.h"

namespace iumad::IUMAD_ISA {

template <class F>
constexpr F kInf = F(__builtin_inf());

// The first `count` lanes from memory, the others `pad`.
template <class F>
inline Vec<F> load_part(const F* p, int64_t count, F pad) {
  F lanes[kLanes<F>];
  for (int i = 0; i < kLanes<F>; ++i) lanes[i] = i < count ? p[i] : pad;
  return load(lanes);
}

template <class F>
inline void store_part(F* p, Vec<F> v, int64_t count) {
  F lanes[kLanes<F>];
  store<F>(lanes, v);
  std::memcpy(p, lanes, count * sizeof(F));
}

// v with the lanes from `count` on set to 0.
template <class F>
inline Vec<F> first_lanes(Vec<F> v, int64_t count) {
  F lanes[kLanes<F>];
  store<F>(lanes, v);
  return load_part<F>(lanes, count, F(0));
}

template <class F>
inline bool is_plain(const RowsView& v) {
  return v.inner_stride == 1 && v.dtype == kDTypeOf<F>;
}

// Row `row` of `n` values: in place where it is already n neighbouring values of type F, else converted into `buffer`.
template <class F>
inline const F* read_row(const RowsView& v, int64_t row, int64_t n, F* buffer, bool in_place = true) {
  const int64_t start = v.offset(row);
  if (in_place && is_plain<F>(v)) return static_cast<const F*>(v.data) + start;
  visit<F>(v.dtype, v.data, [&](auto* p) { load_run(buffer, p + start, v.inner_stride, n); });
  return buffer;
}

// Where to put row `row` (its own place if it is n neighbouring values of type F, else `buffer`), and to finish it off.
template <class F>
inline F* row_target(const RowsView& v, int64_t row, F* buffer) {
  return is_plain<F>(v) ? static_cast<F*>(v.data) + v.offset(row) : buffer;
}
template <class F>
inline void write_row(const RowsView& v, int64_t row, int64_t n, const F* buffer) {
  if (is_plain<F>(v)) return;
  visit<F>(v.dtype, v.data, [&](auto* p) { store_run(p + v.offset(row), v.inner_stride, buffer, n); });
}

}  // namespace iumad::IUMAD_ISA
