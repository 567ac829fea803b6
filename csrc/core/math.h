// The vector functions the kernels need, with their error bounds (checked by tests/kernels/test_math.py).
#pragma once

#include "vec.h"

namespace iumad::IUMAD_ISA {

template <class F>
constexpr F kLog2E = F(1.442695040888963407359924681001892137L);
template <class F>
constexpr F kLn2 = F(0.693147180559945309417232121458176568L);

namespace detail {

// 2^f on [-1/2, 1/2]. float: 1 + f * sum c_i f^i, minimax, relative error 9.2e-8. double: Taylor, 5e-18.
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

#if defined(__AVX512F__)
// 2^(i / 32): as many as one permutation of two registers can look up.
alignas(64) constexpr float kRootsOfTwo[32] = {
    0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};
// For exp2_product_coarse: 2^(i / 32) / (s^2 + k), times 4 or 2 for what floor((i - 32 s) / 32) takes.
constexpr float kCoarseShift = 46.0f / 32, kCoarseTerm = 0x1.0a66b8p+1f;  // s, k
alignas(64) constexpr float kCoarseRoots[32] = {
    0x1.edc58cp-1f, 0x1.f89578p-1f, 0x1.01d100p+0f, 0x1.07763cp+0f, 0x1.0d3b1ep+0f, 0x1.132056p+0f, 0x1.19269ap+0f,
    0x1.1f4ea4p+0f, 0x1.259930p+0f, 0x1.2c0702p+0f, 0x1.3298dcp+0f, 0x1.394f8ap+0f, 0x1.402bdcp+0f, 0x1.472ea2p+0f,
    0x1.4e58b6p-1f, 0x1.55aaf2p-1f, 0x1.5d2638p-1f, 0x1.64cb70p-1f, 0x1.6c9b82p-1f, 0x1.749762p-1f, 0x1.7cc002p-1f,
    0x1.85165cp-1f, 0x1.8d9b76p-1f, 0x1.965050p-1f, 0x1.9f35fap-1f, 0x1.a84d82p-1f, 0x1.b19802p-1f, 0x1.bb1698p-1f,
    0x1.c4ca66p-1f, 0x1.ceb498p-1f, 0x1.d8d65ep-1f, 0x1.e330f0p-1f};

// 32 numbers picked by the low bits of `index`.
inline Vec<float> look_up(const float (&table)[32], Vec<float> index) {
  return (Vec<float>)_mm512_permutex2var_ps((__m512)load(table), (__m512i)index, (__m512)load(table + 16));
}

// x = n + rest for a multiple n of 1/32, up to which are that many in the low bits of `shifted`: rest is within 1/64 where 2^x is
// neither inf nor 0. `shift` is taken off n and added to rest.
struct Split {
  Vec<float> shifted, n, rest;
};
constexpr float kRound32nds = 0x1.8p18f;
inline Split split(Vec<float> x, float shift = 0) {
  x = rounded<float>(x);  // fused with what follows, rest would be its rounding error, which has no bound
  const Vec<float> shifted = x + broadcast(kRound32nds), n = shifted - broadcast(kRound32nds + shift);
  return {shifted, n, x - n};
}
// The same of a b, not rounded; it has to be moderate, see kModerateExponent.
inline Split split_product(Vec<float> a, Vec<float> b, float shift = 0) {
  const Vec<float> shifted = fma(a, b, broadcast(kRound32nds)), n = shifted - broadcast(kRound32nds + shift);
  return {shifted, n, fma(a, b, -n)};
}

// 2^x. scalef multiplies by 2 to the floor of n with correct overflow, underflow and NaN, and by 2^inf or 2^-inf even what is NaN
// as the rest is there: nothing is clamped. What it multiplies is positive for any rest. (vreduceps would give the rest at once,
// but waits for what its register held before, on Zen 4.)
inline Vec<float> exp2(const Split& x) {
  const Vec<float> root = look_up(kRootsOfTwo, x.shifted);
  const Vec<float> slope =
      fma(broadcast(0x1.ebf6a2p-3f), x.rest, broadcast(0x1.62e58p-1f));  // (2^f - 1) / f; minimax, 2^f within 5.3e-8
  return (Vec<float>)_mm512_scalef_ps((__m512)fma(slope, root * x.rest, root), (__m512)x.n);
}
#elif defined(__AVX2__)
// The bits of 2^(i / 8 - 1), as many as one permutation can look up, less i in the upper places of the mantissa: what is left to
// add to n << 20 for the bits of 2^(n / 8 - 1).
alignas(32) constexpr int32_t kHalfRootBits[8] = {0x3f000000, 0x3efb95c2, 0x3ef837f0, 0x3ef5fed7,
                                                  0x3ef504f3, 0x3ef5672a, 0x3ef744fd, 0x3efac0c7};
// For exp2_product_coarse: the same of 2^(i / 8) / (s^2 + k).
constexpr float kCoarseShift = 0x1.716ac6p+0f, kCoarseTerm = 0x1.0a4a7ap+1f;  // s, k
alignas(32) constexpr int32_t kCoarseRootBits[8] = {0x3e75fdc4, 0x3e7620b1, 0x3e72446d, 0x3e6f8170,
                                                    0x3e6df12d, 0x3e6daf6a, 0x3e6eda6a, 0x3e719333};

// 2^(n / 8), halved or whatever the table holds, for an integer n in the low bits of `shifted`.
inline Vec<float> root_of_two(const int32_t (&table)[8], Vec<float> shifted) {
  using I = Vec<int32_t>;
  const I bits = (I)_mm256_permutevar8x32_ps((__m256)load(table), (__m256i)shifted);
  return (Vec<float>)(bits + ((I)shifted << 20));
}
#endif

}  // namespace detail

// What is known of the argument of an exponential: nothing; that 2^x is finite, or NaN; or that 2^x and a few binary orders
// below it are normal numbers, |x| <= kNormalExponent. Either spares AVX2 and less an instruction or two, AVX-512 none.
enum class Range { kAny, kFinite, kNormal };
template <class F>
constexpr F kNormalExponent = sizeof(F) == 8 ? 1000 : 120;
// |x| up to which no step of an exponential overflows: all the more of AVX-512's, which scale by a power of two whatever it is.
template <class F>
constexpr F kModerateExponent = sizeof(F) == 4 && kVectorBytes == 64 ? F(0x1p60) : kNormalExponent<F>;

// 2^x. Relative error < 2e-7 (float), < 4e-16 (double). Without scalef, results under the smallest normal number, or with AVX2
// twice that, are 0 or some smaller number. inf and NaN propagate as in std::exp2.
template <class F, Range range = Range::kAny>
inline Vec<F> exp2(Vec<F> x) {
  using V = Vec<F>;
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    return detail::exp2(detail::split(x));
  } else {
    x = rounded<F>(x);
    const V n = (V)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_NO_EXC);
    return (V)_mm512_scalef_pd((__m512d)detail::exp2_fraction(x - n), (__m512d)n);
  }
#else
  using I = Vec<IntOf<F>>;
  constexpr int kMantissaBits = sizeof(F) == 8 ? 52 : 23;
  const V lowest = broadcast(F(sizeof(F) == 8 ? -1022 : -126)), highest = broadcast(F(sizeof(F) == 8 ? 1024 : 128));
  if constexpr (range == Range::kAny) x = smaller<F>(highest, x);
#if defined(__AVX2__)
  if constexpr (sizeof(F) == 4) {
    // Clamped to where half the result has the exponent of 0.
    x = range == Range::kNormal ? rounded<F>(x) : larger<F>(lowest, x);
    const V magic = broadcast(F(0x1.8p20)), n8 = x + magic, f = x - (n8 - magic);  // in [-1/16, 1/16]
    V slope = fma(broadcast(F(0x1.c6a004p-4)), f, broadcast(F(0x1.ec0c32p-2)));    // 2 (2^f - 1) / f; minimax, 2^f within 2.7e-8
    slope = fma(slope, f, broadcast(F(0x1.62e432p0)));
    return detail::root_of_two(detail::kHalfRootBits, n8) *
           fma(slope, f, broadcast(F(2)));  // halves and doubles: 2^128 has no bits
  }
#endif
  const V magic = broadcast(detail::kRoundMagic<F>);
  const V shifted = x + magic;
  const V p = (V)((I)detail::exp2_fraction(x - (shifted - magic)) + ((I)shifted << kMantissaBits));
  return range == Range::kNormal ? p : x < lowest ? V{} : p;
#endif
}

// 2^(a b), to whose relative error that of the product, rounded, adds |a b| times 4.2e-8 (float) or 7.7e-17 (double).
template <class F, Range range = Range::kAny>
inline Vec<F> exp2_product(Vec<F> a, Vec<F> b) {
  return exp2<F, range>(a * b);
}

// The same for |a b| <= kModerateExponent. Of float with AVX-512 the product is not rounded: an instruction less, but one more
// multiply-add among them (see multiply_adds_cost_no_more in dispatch.h).
template <class F>
inline Vec<F> exp2_product_moderate(Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return detail::exp2(detail::split_product(a, b));
#endif
  return exp2_product<F, Range::kNormal>(a, b);
}

// The same, and 1 where a b is 0, as exactly as results of eight bits ask for: relative error < 4e-6 (AVX-512: 4e-7) plus that of
// the product. 2^f is a square plus a constant, and its factor goes into the table: an instruction less, with AVX2 two. Of float
// with these; else as above. |a b| <= kModerateExponent, or, with AVX-512 and not kModerate, any.
template <class F, bool kModerate>
inline Vec<F> exp2_product_coarse(Vec<F> a, Vec<F> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    constexpr float kShift = detail::kCoarseShift;
    const detail::Split x = kModerate ? detail::split_product(a, b, kShift) : detail::split(a * b, kShift);
    const Vec<F> square = fma(x.rest, x.rest, broadcast(detail::kCoarseTerm));
    return (Vec<F>)_mm512_scalef_ps((__m512)(detail::look_up(detail::kCoarseRoots, x.shifted) * square), (__m512)x.n);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(F) == 4) {
    using V = Vec<float>;
    const V magic = broadcast(0x1.8p20f), shifted = fma(a, b, magic);
    const V g = fma(a, b, broadcast(detail::kCoarseShift)) - (shifted - magic);
    return detail::root_of_two(detail::kCoarseRootBits, shifted) * fma(g, g, broadcast(detail::kCoarseTerm));
  }
#endif
  return exp2_product_moderate<F>(a, b);
}

template <class F, Range range = Range::kAny>
inline Vec<F> exp(Vec<F> x) {
  return exp2_product<F, range>(x, broadcast(kLog2E<F>));
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
// The same with a relative error < 9e-6, for results of eight bits.
inline Vec<float> log1p_unit_coarse(Vec<float> e) {
  Vec<float> p = fma(broadcast(-0x1.87127ap-6f), e, broadcast(0x1.9e9b42p-4f));
  p = fma(p, e, broadcast(-0x1.ae2e02p-3f));
  p = fma(p, e, broadcast(0x1.4d02fap-2f));
  p = fma(p, e, broadcast(-0x1.ff5896p-2f));
  p = fma(p, e, broadcast(0x1.fffee6p-1f));
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
  return {((quarter == 1) | (quarter == 2)) ? -cosine : cosine, quarter >= 2 ? -sine : sine};
}

template <class F>
inline Vec<F> sqrt(Vec<F> x) {
#if defined(IUMAD_MM)
  if constexpr (sizeof(F) == 4) return (Vec<F>)IUMAD_MM(sqrt_ps)((Floats)x);
  if constexpr (sizeof(F) == 8) return (Vec<F>)IUMAD_MM(sqrt_pd)((Doubles)x);
#else
  Vec<F> y;
  for (int i = 0; i < kLanes<F>; ++i) y[i] = sizeof(F) == 8 ? F(__builtin_sqrt(double(x[i]))) : F(__builtin_sqrtf(float(x[i])));
  return y;
#endif
}

namespace detail {

// The steps of the sigmoid: e^-x, which may be inf, and the result.
template <class F>
inline Vec<F> sigmoid_exponential(Vec<F> x) {
  return exp2_product<F>(x, broadcast(-kLog2E<F>));
}
template <class F>
inline Vec<F> sigmoid_result(Vec<F> e) {
  using V = Vec<F>;
  const V one = broadcast(F(1)), s = one + e;
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) {
    const V guess = (V)_mm512_rcp14_ps((__m512)s);
    // Newton's step from the guess. Of s = inf the guess is 0 and the error NaN, of which the maximum makes -1: that stays 0.
    return fma(guess, larger<F>(one - s * guess, -one), guess);
  }
#endif
  return one / s;
}

}  // namespace detail

// 1 / (1 + e^-x), 0 where e^-x is inf.
template <class F>
inline Vec<F> sigmoid(Vec<F> x) {
  return detail::sigmoid_result<F>(detail::sigmoid_exponential<F>(x));
}

// y = the sigmoids of n vectors at x, step by step: of long chains one after another, processors keep few in flight.
template <class F, int n>
inline void sigmoid(const F* x, Vec<F> (&y)[n]) {
  IUMAD_UNROLL
  for (int i = 0; i < n; ++i) y[i] = detail::sigmoid_exponential<F>(load(x + i * kLanes<F>));
  IUMAD_UNROLL
  for (int i = 0; i < n; ++i) y[i] = detail::sigmoid_result<F>(y[i]);
}

// softplus(x) = log(1 + e^x), the identity above 20 (as torch.nn.functional.softplus), and its derivative, from e = e^-|x|: two
// steps, for a loop over each keeps more of these long chains in flight than one over both. kCoarse: of float, the value with a
// relative error < 1e-5.
template <class F>
struct Softplus {
  Vec<F> value, derivative;
};
template <class F, bool kCoarse = false>
inline Softplus<F> softplus(Vec<F> x, Vec<F> e) {
  using V = Vec<F>;
  const V zero{}, one = broadcast(F(1)), threshold = broadcast(F(20));
  V value = larger<F>(zero, x);
  if constexpr (kCoarse) {
    value += log1p_unit_coarse(e);
  } else {
    value += log1p_unit(e);
  }
  const V derivative = (x < zero ? e : one) * reciprocal_near_one<F>(one + e);
  if constexpr (sizeof(F) == 4) return {value, derivative};  // e^-20 adds nothing to either
  return {x > threshold ? x : value, x > threshold ? one : derivative};
}

}  // namespace iumad::IUMAD_ISA
