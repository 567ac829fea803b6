// Vectors of floating-point lanes, as wide as the instruction set this file is compiled for.
//
// Written with the compiler's vector extension (g++ and clang++), so that one text serves AVX-512, AVX2, SSE2 and NEON;
// intrinsics appear only where the compiler's own code is poor. Everything lives in a namespace named after the instruction set:
// the same inline function compiled with different flags must not be merged by the linker.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#ifndef IUMAD_ISA
#error "IUMAD_ISA (the namespace of this instruction set) must be defined by the build"
#endif

// Before a loop whose arrays are meant to live in registers: g++ does not unroll it on its own at -O2, nor long bodies at -O3.
#define IUMAD_UNROLL _Pragma("GCC unroll 16")

namespace iumad::IUMAD_ISA {

// On x86-64, the name of an intrinsic for whole vectors, and their types.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#define IUMAD_MM(name) _mm512_##name
using Floats = __m512;
using Doubles = __m512d;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#define IUMAD_MM(name) _mm256_##name
using Floats = __m256;
using Doubles = __m256d;
#else
constexpr int kVectorBytes = 16;
#if defined(__SSE2__)
#define IUMAD_MM(name) _mm_##name
using Floats = __m128;
using Doubles = __m128d;
#endif
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

template <class F>
using IntOf = std::conditional_t<sizeof(F) == 8, int64_t, int32_t>;

template <class F>
inline Vec<F> broadcast(F s) {
  return s - Vec<F>{};  // x - 0 is x for every x, -0 and NaN included: the compiler emits a plain broadcast
}

template <class F>
inline Vec<F> load(const F* p) {
  Vec<F> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class F>
inline void store(F* p, Vec<F> v) {
  std::memcpy(p, &v, sizeof v);
}

// Stores past the caches, which keeps what is in them and spares memory the reading of what is overwritten: for results too large
// to be found in a cache again. `p` is aligned to a vector; end_streaming() before other threads read.
template <class F>
inline void stream(F* p, Vec<F> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store<F>(p, v);
#endif
}

inline void end_streaming() {
#if defined(__AVX512F__) || defined(__AVX2__)
  _mm_sfence();
#endif
}

// a * b + c; one rounding where the instruction set has FMA (these files are compiled with -ffp-contract=fast).
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}

// Keeps the compiler from fusing the product x with what follows.
template <class F>
inline Vec<F> rounded(Vec<F> x) {
#if defined(IUMAD_EMULATED)
  asm("" : "+m"(x));  // no register is as wide
#elif defined(__SSE2__)
  asm("" : "+v"(x));
#endif
  return x;
}

// The larger or the smaller lanes; b where either is NaN. (Of the plain text g++ makes a comparison and a blend.)
template <class F>
inline Vec<F> larger(Vec<F> a, Vec<F> b) {
#if defined(IUMAD_MM)
  if constexpr (sizeof(F) == 4) return (Vec<F>)IUMAD_MM(max_ps)((Floats)a, (Floats)b);
  if constexpr (sizeof(F) == 8) return (Vec<F>)IUMAD_MM(max_pd)((Doubles)a, (Doubles)b);
#else
  return a > b ? a : b;
#endif
}

template <class F>
inline Vec<F> smaller(Vec<F> a, Vec<F> b) {
#if defined(IUMAD_MM)
  if constexpr (sizeof(F) == 4) return (Vec<F>)IUMAD_MM(min_ps)((Floats)a, (Floats)b);
  if constexpr (sizeof(F) == 8) return (Vec<F>)IUMAD_MM(min_pd)((Doubles)a, (Doubles)b);
#else
  return a < b ? a : b;
#endif
}

// -|x| and |x|
template <class F>
inline Vec<F> minus_abs(Vec<F> x) {
  using I = Vec<IntOf<F>>;
  return (Vec<F>)((I)x | (I)broadcast(F(-0.0)));
}
template <class F>
inline Vec<F> abs(Vec<F> x) {
  using I = Vec<IntOf<F>>;
  return (Vec<F>)((I)x & ~(I)broadcast(F(-0.0)));
}

namespace detail {

// op(lane i, lane i + width) for halving widths, down to one lane.
template <class F, class Op>
inline F reduce_lanes(Vec<F> v, const Op& op) {
  F s[kLanes<F>];
  store<F>(s, v);
  for (int width = kLanes<F> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) s[i] = op(s[i], s[i + width]);
  return s[0];
}

}  // namespace detail

template <class F>
inline F sum_lanes(Vec<F> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  return detail::reduce_lanes<F>(v, [](F a, F b) { return a + b; });
}

// The largest lane, of lanes none of which is NaN.
template <class F>
inline F max_lanes(Vec<F> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  return detail::reduce_lanes<F>(v, [](F a, F b) { return a > b ? a : b; });
}

namespace detail {

// One butterfly stage of the transposition: which lanes of the concatenation (x, y) a row takes.
template <class F, int kStep, bool kUpper, int... kLane>
inline Vec<F> butterfly(Vec<F> x, Vec<F> y, std::integer_sequence<int, kLane...>) {
  constexpr int n = kLanes<F>, upper = kUpper ? kStep : 0;
#if defined(__clang__)
  return __builtin_shufflevector(x, y, ((kLane & kStep) == 0 ? kLane + upper : n + kLane + upper - kStep)...);
#else  // g++ 11 does not have the above
  constexpr Vec<IntOf<F>> pick = {((kLane & kStep) == 0 ? kLane + upper : n + kLane + upper - kStep)...};
  return __builtin_shuffle(x, y, pick);
#endif
}

template <class F, int kStep>
inline void transpose_stage(Vec<F> (&row)[kLanes<F>]) {
  constexpr int n = kLanes<F>;
  using Lane = std::make_integer_sequence<int, n>;
  IUMAD_UNROLL for (int i = 0; i < n; ++i) {
    if (i & kStep) continue;
    const Vec<F> x = row[i], y = row[i + kStep];
    row[i] = butterfly<F, kStep, false>(x, y, Lane{});
    row[i + kStep] = butterfly<F, kStep, true>(x, y, Lane{});
  }
  if constexpr (2 * kStep < n) transpose_stage<F, 2 * kStep>(row);
}

template <class F, int kStep>
inline Vec<F> sum_rows_stage(Vec<F> (&row)[kLanes<F>]) {
  constexpr int n = kLanes<F>;
  using Lane = std::make_integer_sequence<int, n>;
  IUMAD_UNROLL for (int i = 0; i < n / (2 * kStep); ++i) {
    const Vec<F> x = row[2 * i], y = row[2 * i + 1];
    row[i] = butterfly<F, kStep, false>(x, y, Lane{}) + butterfly<F, kStep, true>(x, y, Lane{});
  }
  if constexpr (2 * kStep < n) return sum_rows_stage<F, 2 * kStep>(row);
  return row[0];
}

}  // namespace detail

// The sums of the lanes of as many rows as there are lanes: lane i of the result is the sum of row i. Overwrites the rows.
template <class F>
inline Vec<F> sum_rows(Vec<F> (&row)[kLanes<F>]) {
  return detail::sum_rows_stage<F, 1>(row);
}

// In-place transposition of a square block of lanes x lanes values.
template <class F>
inline void transpose(Vec<F> (&row)[kLanes<F>]) {
  if constexpr (kLanes<F> > 1) detail::transpose_stage<F, 1>(row);
}

}  // namespace iumad::IUMAD_ISA
