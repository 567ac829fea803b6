// Element types to compute lanes and back. Compute type F is float or double; storage adds bfloat16 and float16.
#pragma once

#include "dtype.h"
#include "vec.h"

namespace iumad::IUMAD_ISA {

template <class F>
constexpr DType kDTypeOf = sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32;  // of a compute type

struct BFloat16 {
  uint16_t bits;
};
#if defined(__aarch64__)
using Float16 = __fp16;  // g++ before 13 has no _Float16 there
#else
using Float16 = _Float16;
#endif

inline float to_compute(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float to_compute(Float16 x) { return float(x); }
inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }

template <class T, class F>
inline T from_compute(F x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const float f = float(x);
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    if (f != f) return {uint16_t((bits >> 16) | 0x40)};             // keep a NaN a NaN
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest even
  } else {
    return T(x);
  }
}

namespace detail {
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
#if defined(__AVX512F__)
// The word each word of the result comes from: all to the upper halves of dwords, and back.
alignas(64) constexpr uint16_t kToUpperHalves[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                     0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
alignas(64) constexpr uint16_t kUpperHalves[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
#endif
}  // namespace detail

inline Vec<float> load_lanes(const float* p) { return load(p); }
inline Vec<double> load_lanes(const double* p) { return load(p); }
inline Vec<float> load_lanes(const BFloat16* p) {
  detail::HalfWords h;
  std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
  const __m512i to = (__m512i)load(detail::kToUpperHalves), words = _mm512_castsi256_si512((__m256i)h);
  return (Vec<float>)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, to, words);
#else
  return (Vec<float>)(__builtin_convertvector(h, Vec<uint32_t>) << 16);
#endif
}
inline Vec<float> load_lanes(const Float16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = float(p[i]);
  return v;
#endif
}

inline void store_lanes(float* p, Vec<float> v) { store(p, v); }
inline void store_lanes(double* p, Vec<double> v) { store(p, v); }
inline void store_lanes(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)  // the same but for results under the smallest normal number, which become 0
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#elif defined(__AVX512F__)  // as below, in half as many instructions
  const __m512i bits = (__m512i)v;
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmpunord_ps_mask((__m512)v, (__m512)v);
  __m512i rounded = (__m512i)((Vec<uint32_t>)bits + 0x7fff);
  rounded = _mm512_mask_add_epi32(rounded, odd, bits, _mm512_set1_epi32(0x8000));
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  const __m512i upper = _mm512_permutexvar_epi16((__m512i)load(detail::kUpperHalves), rounded);
  std::memcpy(p, &upper, sizeof upper / 2);
#else
  using U = Vec<uint32_t>;
  const U bits = (U)v;
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U nan = (bits >> 16) | 0x40;
  const detail::HalfWords h = __builtin_convertvector(v != v ? nan : rounded, detail::HalfWords);
  std::memcpy(p, &h, sizeof h);
#endif
}
inline void store_lanes(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = Float16(v[i]);
#endif
}

// dst[i] = p[i * stride], and back, for a run of n elements.
template <class F, class T>
inline void load_run(F* dst, const T* p, int64_t stride, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes<F> <= n; i += kLanes<F>) store<F>(dst + i, load_lanes(p + i));
  for (; i < n; ++i) dst[i] = to_compute(p[i * stride]);
}
template <class F, class T>
inline void store_run(T* p, int64_t stride, const F* src, int64_t n) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes<F> <= n; i += kLanes<F>) store_lanes(p + i, load(src + i));
  for (; i < n; ++i) p[i * stride] = from_compute<T>(src[i]);
}

// Calls f with a typed pointer to the elements; float64 tensors are computed in double, the rest in float.
template <class F, class Visitor>
inline void visit(DType dtype, void* data, Visitor&& f) {
  if constexpr (sizeof(F) == 8) {
    f(static_cast<double*>(data));
  } else {
    switch (dtype) {
      case DType::kFloat32:
        return f(static_cast<float*>(data));
      case DType::kBFloat16:
        return f(static_cast<BFloat16*>(data));
      case DType::kFloat16:
        return f(static_cast<Float16*>(data));
      case DType::kFloat64:
        return;  // excluded by the caller: one double tensor makes all of them double
    }
  }
}

}  // namespace iumad::IUMAD_ISA
