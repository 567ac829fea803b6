// The vector functions the kernels need, with their error bounds (checked by tests/kernels/test_math.py).
#pragma once

#include "vec.h"

namespace iumad::IUMAD_ISA {

template <class F>
constexpr F kLog2E = F(1.442695040888963407359924681001892137L);
template <class F>
constexpr F kLn2 = F(0.693147180559945309417232121458176568L);

namespace detail {

// 2^f on [-1/2, 1/2] as 1 + f * sum c_i f^i. float: minimax, relative error 9.2e-8. double: Taylor, 5e-18.
inline Vec<float> exp2_fraction(Vec<float> f) {
  Vec<float> p = fma(broadcast(0x1.5bba14p-10f), f, broadcast(0x1.3cea88p-7f));
  p = fma(p, f, broadcast(0x1.c6b752p-5f));
  p = fma(p, f, broadcast(0x1.ebf9bcp-3f));
  p = fma(p, f, broadcast(0x1.62e42ap-1f));
  return fma(p, f, broadcast(1.0f));
}

inline Vec<double> exp2_fraction(Vec<double> f) {
  constexpr int kDegree = 14;
  double coefficient[kDegree + 1] = {1.0};
  for (int i = 1; i <= kDegree; ++i) coefficient[i] = coefficient[i - 1] * kLn2<double> / i;
  Vec<double> p = broadcast(coefficient[kDegree]);
  for (int i = kDegree - 1; i >= 0; --i) p = fma(p, f, broadcast(coefficient[i]));
  return p;
}

template <class F>
constexpr F kRoundMagic = sizeof(F) == 8 ? F(0x1.8p52) : F(0x1.8p23);  // adding it rounds to an integer, kept in the low bits

}  // namespace detail

// 2^(a b), relative error < 2e-7 (float; where the instruction set lacks FMA or scalef, plus the rounding of a b), < 4e-16 (1 +
// |a b|) (double). Without scalef, results under the smallest normal number are 0. inf and NaN propagate as in
// std::exp2; finite a and b must have a finite product.
template <class F>
inline Vec<F> exp2_product(Vec<F> a, Vec<F> b) {
  using V = Vec<F>;
  const V magic = broadcast(detail::kRoundMagic<F>);
#if defined(__AVX512F__)
  // scalef multiplies by 2^n with correct overflow, underflow and NaN, so nothing is clamped, and the fraction a b - n is exact.
  const V n = fma(a, b, magic) - magic;
  const V p = detail::exp2_fraction(fma(a, b, -n));
  if constexpr (sizeof(F) == 4) {
    return (V)_mm512_scalef_ps((__m512)p, (__m512)n);
  } else {
    return (V)_mm512_scalef_pd((__m512d)p, (__m512d)n);
  }
#else
  using I = Vec<IntOf<F>>;
  constexpr int kMantissaBits = sizeof(F) == 8 ? 52 : 23;
  const V lowest = broadcast(F(sizeof(F) == 8 ? -1022 : -126)), highest = broadcast(F(sizeof(F) == 8 ? 1024 : 128));
  V x = a * b;
  x = x > highest ? highest : x;  // written so that NaN stays NaN
  const V shifted = x + magic;
  const V p = detail::exp2_fraction(x - (shifted - magic));
  return x < lowest ? V{} : (V)((I)p + ((I)shifted << kMantissaBits));
#endif
}

template <class F>
inline Vec<F> exp(Vec<F> x) {
  return exp2_product<F>(x, broadcast(kLog2E<F>));
}

// e^(a b) with log2(e) already in b, for a b <= 0: as exp2_product, but results under the smallest normal number are 0, as they
// must be for probabilities of logits of -inf, and a b may overflow, as it does for logits masked with the lowest number.
template <class F>
inline Vec<F> exp_or_zero(Vec<F> a, Vec<F> b) {
  return a * b < broadcast(F(sizeof(F) == 8 ? -1022 : -126)) ? Vec<F>{} : exp2_product<F>(a, b);
}

// log(1 + e) for e in [0, 1]. Relative error < 2e-7 (float: minimax polynomial), < 1e-15 (double: 2 atanh(e / (2 + e))).
inline Vec<float> log1p_unit(Vec<float> e) {
  Vec<float> p = fma(broadcast(0x1.56ee0ap-8f), e, broadcast(-0x1.e369f2p-6f));
  p = fma(p, e, broadcast(0x1.4069dcp-4f));
  p = fma(p, e, broadcast(-0x1.17d2c4p-3f));
  p = fma(p, e, broadcast(0x1.874a82p-3f));
  p = fma(p, e, broadcast(-0x1.fcc8c6p-3f));
  p = fma(p, e, broadcast(0x1.553004p-2f));
  p = fma(p, e, broadcast(-0x1.fffeacp-2f));
  p = fma(p, e, broadcast(0x1.fffffep-1f));
  return p * e;
}
inline Vec<double> log1p_unit(Vec<double> e) {
  const Vec<double> s = e / (e + broadcast(2.0)), v = s * s;
  Vec<double> p = broadcast(1.0 / 35);
  for (int k = 33; k >= 1; k -= 2) p = fma(p, v, broadcast(1.0 / k));
  return (s + s) * p;
}

// 1 / x for x in [1, 2], within one unit in the last place; a 512-bit division would take as long as sixteen multiplications.
template <class F>
inline Vec<F> reciprocal_near_one(Vec<F> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    const Vec<F> guess = (Vec<F>)_mm512_rcp14_ps((__m512)x);
    return fma(guess, broadcast(F(1)) - x * guess, guess);
  }
#endif
  return broadcast(F(1)) / x;
}

// log(x) for positive normal x. Relative error < 4e-7 (float), < 1e-15 (double), also near 1.
template <class F>
inline Vec<F> log(Vec<F> x) {
  using V = Vec<F>;
  using I = Vec<IntOf<F>>;
  constexpr int kMantissaBits = sizeof(F) == 8 ? 52 : 23;
  constexpr IntOf<F> kSqrtHalf = sizeof(F) == 8 ? IntOf<F>(0x3fe6a09e667f3bcdLL) : IntOf<F>(0x3f3504f3);
  const I exponent = ((I)x - kSqrtHalf) >> kMantissaBits;  // x = 2^exponent m with m in [sqrt(1/2), sqrt(2))
  const V m = (V)((I)x - (exponent << kMantissaBits));
  const V s = (m - broadcast(F(1))) / (m + broadcast(F(1))), v = s * s;  // log m = 2 atanh(s), |s| < 0.172
  V p = broadcast(F(1) / F(sizeof(F) == 8 ? 21 : 9));
  for (int k = sizeof(F) == 8 ? 19 : 7; k >= 1; k -= 2) p = fma(p, v, broadcast(F(1) / F(k)));
  return fma(__builtin_convertvector(exponent, V), broadcast(kLn2<F>), (s + s) * p);
}

// cos and sin of 2 pi x for x in [0, 1), absolute error < 2e-7 (float), < 1e-15 (double).
template <class F>
struct CosSin {
  Vec<F> cos, sin;
};
template <class F>
inline CosSin<F> cos_sin_turns(Vec<F> x) {
  using V = Vec<F>;
  using I = Vec<IntOf<F>>;
  const V quarters = x * broadcast(F(4)), shifted = quarters + broadcast(detail::kRoundMagic<F>);
  const V f = (quarters - (shifted - broadcast(detail::kRoundMagic<F>))) * broadcast(F(1.570796326794896619231321691639751442L));
  const I quarter = (I)shifted & 3;
  const V v = -f * f;
  // Taylor series on [-pi/4, pi/4].
  constexpr int kLast = sizeof(F) == 8 ? 16 : 8;
  V c = broadcast(F(1)), s = c;
  for (int k = kLast; k >= 2; k -= 2) {
    c = fma(c, v * broadcast(F(1) / F(k * (k - 1))), broadcast(F(1)));
    s = fma(s, v * broadcast(F(1) / F(k * (k + 1))), broadcast(F(1)));
  }
  s *= f;
  const auto odd = (quarter & 1) != 0;
  const V cosine = odd ? s : c, sine = odd ? c : s;
  return {(quarter == 1) | (quarter == 2) ? -cosine : cosine, quarter >= 2 ? -sine : sine};
}

template <class F>
inline Vec<F> sqrt(Vec<F> x) {
  Vec<F> y;
  for (int i = 0; i < kLanes<F>; ++i) y[i] = sizeof(F) == 8 ? F(__builtin_sqrt(double(x[i]))) : F(__builtin_sqrtf(float(x[i])));
  return y;
}

template <class F>
inline Vec<F> abs(Vec<F> x) {
  return x < Vec<F>{} ? -x : x;
}

namespace detail {

// e^-|x|, 0 where that is under the smallest normal number (also for |x| so large that exp2_product would lose its fraction).
template <class F>
inline Vec<F> exp_minus_abs(Vec<F> x) {
  const Vec<F> a = abs<F>(x);
  return a > broadcast(F(sizeof(F) == 8 ? 708.3 : 87.3)) ? Vec<F>{} : exp<F>(-a);
}

}  // namespace detail

// 1 / (1 + e^-x) without overflow on either side.
template <class F>
inline Vec<F> sigmoid(Vec<F> x) {
  using V = Vec<F>;
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    // Rounding leaves no fraction of exponents that are too large to have one, and scalef makes 0 or inf of them: no clamping.
    const V t = x * broadcast(-kLog2E<F>), n = (V)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
    const V e = (V)_mm512_scalef_ps((__m512)detail::exp2_fraction(t - n), (__m512)n);
    const V s = e + broadcast(F(1)), guess = (V)_mm512_rcp14_ps((__m512)s);
    // Newton's step from the guess. Of s = inf the guess is 0 and the error NaN, of which the maximum makes -1: that stays 0.
    const V error = (V)_mm512_max_ps((__m512)(broadcast(F(1)) - s * guess), (__m512)broadcast(F(-1)));
    return fma(guess, error, guess);
  }
#endif
  const V e = detail::exp_minus_abs<F>(x);
  const V one = broadcast(F(1));
  return (x < V{} ? e : one) * reciprocal_near_one<F>(one + e);
}

// softplus(x) = log(1 + e^x), the identity above 20 (as torch.nn.functional.softplus), and its derivative.
template <class F>
struct Softplus {
  Vec<F> value, derivative;
};
template <class F>
inline Softplus<F> softplus(Vec<F> x) {
  using V = Vec<F>;
  const V zero{}, one = broadcast(F(1)), threshold = broadcast(F(20));
  const V e = detail::exp_minus_abs<F>(x);
  const V value = log1p_unit(e) + (x < zero ? zero : x);
  const V derivative = (x < zero ? e : one) * reciprocal_near_one<F>(one + e);
  return {x > threshold ? x : value, x > threshold ? one : derivative};
}

}  // namespace iumad::IUMAD_ISA
