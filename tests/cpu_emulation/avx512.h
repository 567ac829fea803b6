// The AVX-512, AVX512-BF16 and AMX instructions the kernels name, in plain C++ after Intel's manuals, so that those kernels can
// be tested on any CPU with AVX2. Slow, and no part of a normal build: `cmake -DIUMAD_EMULATE=ON` compiles them for AVX2 with
// this file included before anything else, and with __AVX512BF16__ and __AMX_BF16__ defined where the instructions they stand for
// are wanted.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

// Only now: the compiler's own headers take it for leave to use these instructions.
#define __AVX512F__ 1
#define IUMAD_EMULATED 1

namespace iumad_emulated {

using Int = __m512i;
using Float = __m512;
using Double = __m512d;
using Bf16 = __m512bh;

template <class Vector>
Vector load(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T, class Vector>
T lane(const Vector& v, unsigned i) {
  T x;
  std::memcpy(&x, reinterpret_cast<const char*>(&v) + i * sizeof x, sizeof x);
  return x;
}

// Lane i is f(i).
template <class Vector, class T, class F>
Vector make(F f) {
  constexpr unsigned n = sizeof(Vector) / sizeof(T);
  T x[n];
  for (unsigned i = 0; i < n; ++i) x[i] = f(i);
  return load<Vector>(x);
}

// Lane i is f of the lanes i of the vectors.
template <class T, class F, class Vector, class... Vectors>
Vector each(F f, const Vector& first, const Vectors&... others) {
  return make<Vector, T>([&](unsigned i) { return f(lane<T>(first, i), lane<T>(others, i)...); });
}

// Bit i is f of the lanes i.
template <class T, class F>
unsigned bits(F f, const Int& a, const Int& b) {
  unsigned set = 0;
  for (unsigned i = 0; i < 64 / sizeof(T); ++i) set |= unsigned(f(lane<T>(a, i), lane<T>(b, i))) << i;
  return set;
}

// Halves onto halves, as the compiler does it.
template <class T, class Vector, class F>
T reduce(const Vector& v, F f) {
  T x[sizeof v / sizeof(T)];
  std::memcpy(x, &v, sizeof v);
  for (unsigned width = sizeof v / sizeof(T) / 2; width > 0; width /= 2)
    for (unsigned i = 0; i < width; ++i) x[i] = f(x[i], x[i + width]);
  return x[0];
}

// b where either is NaN.
template <class T>
T larger(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T smaller(T a, T b) {
  return a < b ? a : b;
}

// x 2^floor(y)
template <class T>
T scalef(T x, T y) {
  constexpr T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  if (y != y) return y;
  if (x != x) return y == inf ? inf : y == -inf ? T(0) : x;
  if (y == inf) return x == 0 ? nan : std::copysign(inf, x);
  if (y == -inf) return std::isinf(x) ? nan : std::copysign(T(0), x);
  constexpr T kMost = 5000;  // enough to leave the range of either type from any x
  return std::ldexp(x, int(std::floor(y > kMost ? kMost : y < -kMost ? -kMost : y)));
}

// 1 / x, wrong by nearly the 2^-14 that the instruction may be wrong by.
inline float rcp14(float x) {
  const float y = 1 / x;
  return std::isinf(y) || y == 0 ? y : y * (1 - 0x1.fp-15f);
}

// bfloat16, whose instructions take and give 0 in place of numbers under the smallest normal one.
inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline float from_bf16(uint16_t x) {
  const uint32_t word = uint32_t(x) << 16;
  return flushed(load<float>(&word));
}
inline uint16_t to_bf16(float x) {
  x = flushed(x);
  const uint32_t word = load<uint32_t>(&x);
  return uint16_t(x != x ? word >> 16 | 0x40 : (word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline float multiply_add(uint16_t a, uint16_t b, float sum) {
  return flushed(std::fma(from_bf16(a), from_bf16(b), flushed(sum)));
}

inline Int set1_epi32(int x) {
  return make<Int, int>([&](unsigned) { return x; });
}
inline Int set1_epi64(int64_t x) {
  return make<Int, int64_t>([&](unsigned) { return x; });
}
inline Float loadu_ps(const void* p) { return load<Float>(p); }
inline void storeu_si512(void* p, Int x) { std::memcpy(p, &x, sizeof x); }
inline Int or_si512(Int a, Int b) { return a | b; }
inline Int slli_epi32(Int a, unsigned by) {
  return each<uint32_t>([&](uint32_t x) { return x << by; }, a);
}
inline Int mul_epu32(Int a, Int b) {
  return each<uint64_t>([](uint64_t x, uint64_t y) { return uint64_t(uint32_t(x)) * uint32_t(y); }, a, b);
}
inline Int ternarylogic_epi64(Int a, Int b, Int c, unsigned table) {
  return make<Int, uint64_t>([&](unsigned i) {
    uint64_t result = 0;
    for (int bit = 0; bit < 64; ++bit) {
      const auto at = [&](const Int& x) { return unsigned(lane<uint64_t>(x, i) >> bit & 1); };
      result |= uint64_t(table >> (4 * at(a) + 2 * at(b) + at(c)) & 1) << bit;
    }
    return result;
  });
}
// Four elements from among each four; from `kept` where the bit of `mask` is not set.
inline Int mask_shuffle_epi32(Int kept, unsigned mask, Int a, unsigned pick) {
  return make<Int, int>(
      [&](unsigned i) { return mask >> i & 1 ? lane<int>(a, (i & ~3u) + (pick >> 2 * (i & 3) & 3)) : lane<int>(kept, i); });
}
inline Int shuffle_epi32(Int a, unsigned pick) { return mask_shuffle_epi32(a, 0xffff, a, pick); }
inline unsigned cmpge_epu32_mask(Int a, Int b) {
  return bits<uint32_t>([](uint32_t x, uint32_t y) { return x >= y; }, a, b);
}
inline unsigned cmpge_epu64_mask(Int a, Int b) {
  return bits<uint64_t>([](uint64_t x, uint64_t y) { return x >= y; }, a, b);
}
inline unsigned test_epi32_mask(Int a, Int b) {
  return bits<uint32_t>([](uint32_t x, uint32_t y) { return (x & y) != 0; }, a, b);
}
inline unsigned cmpunord_ps_mask(Float a, Float b) {
  return bits<float>([](float x, float y) { return x != x || y != y; }, (Int)a, (Int)b);
}
// a + b, or a | b; from `kept` where the bit of `mask` is not set.
inline Int mask_add_epi32(Int kept, unsigned mask, Int a, Int b) {
  return make<Int, uint32_t>(
      [&](unsigned i) { return mask >> i & 1 ? lane<uint32_t>(a, i) + lane<uint32_t>(b, i) : lane<uint32_t>(kept, i); });
}
inline Int mask_or_epi32(Int kept, unsigned mask, Int a, Int b) {
  return make<Int, uint32_t>(
      [&](unsigned i) { return mask >> i & 1 ? lane<uint32_t>(a, i) | lane<uint32_t>(b, i) : lane<uint32_t>(kept, i); });
}
inline Int maskz_permutexvar_epi16(unsigned mask, Int index, Int a) {
  return make<Int, uint16_t>(
      [&](unsigned i) { return mask >> i & 1 ? lane<uint16_t>(a, lane<uint16_t>(index, i) & 31) : uint16_t(0); });
}
inline Int permutexvar_epi16(Int index, Int a) { return maskz_permutexvar_epi16(~0u, index, a); }
inline Int castsi256_si512(__m256i a) {
  Int x{};
  std::memcpy(&x, &a, sizeof a);
  return x;
}
inline Float maskz_mov_ps(unsigned mask, Float a) {
  return make<Float, float>([&](unsigned i) { return mask >> i & 1 ? a[i] : 0; });
}
inline Double maskz_mov_pd(unsigned mask, Double a) {
  return make<Double, double>([&](unsigned i) { return mask >> i & 1 ? a[i] : 0; });
}
inline Float permutex2var_ps(Float low, Int index, Float high) {
  return make<Float, float>([&](unsigned i) {
    const unsigned at = lane<unsigned>(index, i) & 31;
    return at < 16 ? low[at] : high[at - 16];
  });
}
inline Float max_ps(Float a, Float b) { return each<float>(larger<float>, a, b); }
inline Double max_pd(Double a, Double b) { return each<double>(larger<double>, a, b); }
inline Float min_ps(Float a, Float b) { return each<float>(smaller<float>, a, b); }
inline Double min_pd(Double a, Double b) { return each<double>(smaller<double>, a, b); }
inline Float sqrt_ps(Float a) {
  return each<float>([](float x) { return std::sqrt(x); }, a);
}
inline Double sqrt_pd(Double a) {
  return each<double>([](double x) { return std::sqrt(x); }, a);
}
inline Float rcp14_ps(Float a) { return each<float>(rcp14, a); }
inline Float scalef_ps(Float a, Float b) { return each<float>(scalef<float>, a, b); }
inline Double scalef_pd(Double a, Double b) { return each<double>(scalef<double>, a, b); }
inline Double roundscale_pd(Double a, int) {  // only ever to the nearest integer
  return each<double>([](double x) { return std::nearbyint(x); }, a);
}
inline float reduce_add_ps(Float a) {
  return reduce<float>(a, [](float x, float y) { return x + y; });
}
inline float reduce_max_ps(Float a) { return reduce<float>(a, larger<float>); }

inline Int cvtepu16_epi32(__m256i a) {
  return make<Int, uint32_t>([&](unsigned i) { return lane<uint16_t>(a, i); });
}
inline Float cvtph_ps(__m256i a) {
  return make<Float, float>([&](unsigned i) { return _cvtsh_ss(lane<uint16_t>(a, i)); });
}
inline __m256i cvtps_ph(Float a, int) {  // only ever to the nearest
  return make<__m256i, uint16_t>([&](unsigned i) { return _cvtss_sh(a[i], _MM_FROUND_TO_NEAREST_INT); });
}
inline __m256bh cvtneps_pbh(Float a) {
  return make<__m256bh, uint16_t>([&](unsigned i) { return to_bf16(a[i]); });
}
inline Float dpbf16_ps(Float sum, Bf16 a, Bf16 b) {
  return make<Float, float>([&](unsigned i) {
    const auto term = [&](unsigned j, float s) { return multiply_add(lane<uint16_t>(a, j), lane<uint16_t>(b, j), s); };
    return term(2 * i, term(2 * i + 1, sum[i]));
  });
}

// Eight tiles of up to 16 rows of 64 bytes.
struct Tiles {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
  unsigned char data[8][16][64];

  // The processor would stop as well: no tile may be used before it was configured.
  void must_be_configured() const {
    if (palette != 1) std::abort();
  }
};
inline thread_local Tiles tiles{};

inline void tile_loadconfig(const void* config) {
  std::memset(&tiles, 0, sizeof tiles);
  std::memcpy(&tiles, config, 64);
}
inline void tile_release() { tiles.palette = 0; }
inline void tile_zero(int t) {
  tiles.must_be_configured();
  std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}
inline void tile_loadd(int t, const void* from, int64_t stride) {
  tile_zero(t);
  for (int r = 0; r < tiles.rows[t]; ++r)
    std::memcpy(tiles.data[t][r], static_cast<const char*>(from) + r * stride, tiles.row_bytes[t]);
}
inline void tile_stored(int t, void* to, int64_t stride) {
  tiles.must_be_configured();
  for (int r = 0; r < tiles.rows[t]; ++r) std::memcpy(static_cast<char*>(to) + r * stride, tiles.data[t][r], tiles.row_bytes[t]);
}
inline void tile_dpbf16ps(int c, int a, int b) {
  tiles.must_be_configured();
  for (int m = 0; m < tiles.rows[c]; ++m)
    for (int n = 0; n < tiles.row_bytes[c] / 4; ++n) {
      float sum[2] = {};  // of the even and of the odd products
      for (int k = 0; k < tiles.row_bytes[a] / 4; ++k)
        for (int j = 0; j < 2; ++j)
          sum[j] = multiply_add(lane<uint16_t>(tiles.data[a][m], unsigned(2 * k + j)),
                                lane<uint16_t>(tiles.data[b][k], unsigned(2 * n + j)), sum[j]);
      unsigned char* at = tiles.data[c][m] + 4 * n;
      const float total = flushed(flushed(load<float>(at)) + flushed(sum[0] + sum[1]));
      std::memcpy(at, &total, sizeof total);
    }
}

}  // namespace iumad_emulated

#define _mm512_castsi256_si512 iumad_emulated::castsi256_si512
#define _mm512_cmpge_epu32_mask iumad_emulated::cmpge_epu32_mask
#define _mm512_cmpge_epu64_mask iumad_emulated::cmpge_epu64_mask
#define _mm512_cmpunord_ps_mask iumad_emulated::cmpunord_ps_mask
#define _mm512_cvtepu16_epi32 iumad_emulated::cvtepu16_epi32
#define _mm512_cvtneps_pbh iumad_emulated::cvtneps_pbh
#define _mm512_cvtph_ps iumad_emulated::cvtph_ps
#define _mm512_cvtps_ph iumad_emulated::cvtps_ph
#define _mm512_dpbf16_ps iumad_emulated::dpbf16_ps
#define _mm512_loadu_ps iumad_emulated::loadu_ps
#define _mm512_mask_add_epi32 iumad_emulated::mask_add_epi32
#define _mm512_mask_or_epi32 iumad_emulated::mask_or_epi32
#define _mm512_mask_shuffle_epi32 iumad_emulated::mask_shuffle_epi32
#define _mm512_maskz_mov_pd iumad_emulated::maskz_mov_pd
#define _mm512_maskz_mov_ps iumad_emulated::maskz_mov_ps
#define _mm512_maskz_permutexvar_epi16 iumad_emulated::maskz_permutexvar_epi16
#define _mm512_max_pd iumad_emulated::max_pd
#define _mm512_max_ps iumad_emulated::max_ps
#define _mm512_min_pd iumad_emulated::min_pd
#define _mm512_min_ps iumad_emulated::min_ps
#define _mm512_mul_epu32 iumad_emulated::mul_epu32
#define _mm512_or_si512 iumad_emulated::or_si512
#define _mm512_permutex2var_ps iumad_emulated::permutex2var_ps
#define _mm512_permutexvar_epi16 iumad_emulated::permutexvar_epi16
#define _mm512_rcp14_ps iumad_emulated::rcp14_ps
#define _mm512_reduce_add_ps iumad_emulated::reduce_add_ps
#define _mm512_reduce_max_ps iumad_emulated::reduce_max_ps
#define _mm512_roundscale_pd iumad_emulated::roundscale_pd
#define _mm512_scalef_pd iumad_emulated::scalef_pd
#define _mm512_scalef_ps iumad_emulated::scalef_ps
#define _mm512_set1_epi32 iumad_emulated::set1_epi32
#define _mm512_set1_epi64 iumad_emulated::set1_epi64
#define _mm512_shuffle_epi32 iumad_emulated::shuffle_epi32
#define _mm512_slli_epi32 iumad_emulated::slli_epi32
#define _mm512_sqrt_pd iumad_emulated::sqrt_pd
#define _mm512_sqrt_ps iumad_emulated::sqrt_ps
#define _mm512_storeu_si512 iumad_emulated::storeu_si512
#define _mm512_ternarylogic_epi64 iumad_emulated::ternarylogic_epi64
#define _mm512_test_epi32_mask iumad_emulated::test_epi32_mask
#define _mm512_stream_si512 iumad_emulated::storeu_si512

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig iumad_emulated::tile_loadconfig
#define _tile_release iumad_emulated::tile_release
#define _tile_zero iumad_emulated::tile_zero
#define _tile_loadd iumad_emulated::tile_loadd
#define _tile_stored iumad_emulated::tile_stored
#define _tile_dpbf16ps iumad_emulated::tile_dpbf16ps
