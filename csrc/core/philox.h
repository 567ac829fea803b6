// Random numbers by position: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// A seed (64 bits) names a stream of 32-bit words; any word can be had without those before it, so neither threads nor blocking
// can change what a position gets, and backward recomputes what forward drew. Layout, which every backend has to reproduce:
//
//   block b = words 64 b .. 64 b + 63                 counter c = 16 b + lane,  lane = 0 .. 15
//   word 64 b + 16 w + lane = output w (0 .. 3) of Philox with counter words (c mod 2^32, c / 2^32, 0, 0) and
//   key words (seed mod 2^32, seed / 2^32)
//
// i.e. word i is output (i / 16) % 4 of counter 16 (i / 64) + i % 16: sixteen counters run in lanes and give 64 words in order.
// The same in plain PyTorch: iumad_kernels/reference/philox.py. In Triton: tl.randint4x(seed, c).
#pragma once

#include "vec.h"

namespace iumad::IUMAD_ISA {

constexpr int kPhiloxBlock = 64;  // words

// The keys of the ten rounds, in every lane.
struct PhiloxKeys {
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      first[round] = Vec<uint64_t>{} + key0, second[round] = Vec<uint64_t>{} + key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
  Vec<uint64_t> first[10], second[10];
};

namespace detail {

// Product of the low halves of every 64-bit lane.
inline Vec<uint64_t> multiply_low_halves(Vec<uint64_t> a, Vec<uint64_t> b) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

// The high half of every 64-bit lane in its low half (the high half is noise), by a shuffle: with shifts for every other product
// the work is spread over both ports that have 512-bit instructions.
inline Vec<uint64_t> shuffle_high_halves(Vec<uint64_t> a) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_shuffle_epi32((__m512i)a, _MM_PERM_ENUM(0xF5));
#else
  return a >> 32;
#endif
}

inline Vec<uint64_t> exclusive_or(Vec<uint64_t> a, Vec<uint64_t> b, Vec<uint64_t> c) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// Ten rounds on one counter per 64-bit lane; each of the four words occupies the low half of its lane (the high half is noise).
// n vectors of counters step by step together, for a round waits for the one before it.
template <int n>
inline void philox(const PhiloxKeys& keys, const Vec<uint64_t> (&counter)[n], Vec<uint64_t> (&word)[n][4]) {
  using U = Vec<uint64_t>;
  const U multiplier0 = U{} + 0xD2511F53u, multiplier1 = U{} + 0xCD9E8D57u;
  IUMAD_UNROLL for (int i = 0; i < n; ++i) {  // round 1, where the last two counter words are 0
    const U product = multiply_low_halves(counter[i], multiplier0);
    word[i][0] = (counter[i] >> 32) ^ keys.first[0], word[i][1] = U{};
    word[i][2] = (product >> 32) ^ keys.second[0], word[i][3] = product;
  }
  IUMAD_UNROLL for (int round = 1; round < 10; ++round) {
    IUMAD_UNROLL for (int i = 0; i < n; ++i) {
      U(&c)[4] = word[i];
      const U product0 = multiply_low_halves(c[0], multiplier0), product1 = multiply_low_halves(c[2], multiplier1);
      c[0] = exclusive_or(product1 >> 32, c[1], keys.first[round]);
      c[2] = exclusive_or(shuffle_high_halves(product0), c[3], keys.second[round]);
      c[1] = product1;
      c[3] = product0;
    }
  }
}

}  // namespace detail

namespace detail {

// Calls f(b, lane, w, even, odd) for all words of blocks [first, first + count), 2 kLanes<uint64_t> words at a time: words
// `lane`, `lane + 1`, ... of the w-th sixteen of block b, alternately in the low halves of `even` and of `odd`.
template <class Body>
inline void for_random_words(const PhiloxKeys& keys, uint64_t first, int64_t count, Body&& f) {
  using U = Vec<uint64_t>;
  constexpr int n = kLanes<uint64_t>;
  U even;  // counters 0, 2, 4, ...
  for (int lane = 0; lane < n; ++lane) even[lane] = uint64_t(2 * lane);
  int64_t b = 0;
  const auto run = [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    for (; b + kBlocks <= count; b += kBlocks)
      for (int lane = 0; lane < 16; lane += 2 * n) {
        U counter[2 * kBlocks], word[2 * kBlocks][4];
        IUMAD_UNROLL for (int i = 0; i < 2 * kBlocks; ++i) counter[i] =
            even + (16 * (first + uint64_t(b + i / 2)) + uint64_t(lane + i % 2));
        philox(keys, counter, word);
        IUMAD_UNROLL for (int i = 0; i < kBlocks; ++i) for (int w = 0; w < 4; ++w)
            f(b + i, lane, w, word[2 * i][w], word[2 * i + 1][w]);
      }
  };
  run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

// Bit i: whether the low half of lane i is at least `threshold`.
inline uint64_t lanes_at_least(Vec<uint64_t> x, uint32_t threshold) {
  const Vec<uint64_t> low = x & 0xffffffff;
#if defined(__AVX512F__)
  return _mm512_cmpge_epu64_mask((__m512i)low, _mm512_set1_epi64(threshold));
#else
  uint64_t bits = 0;
  for (int i = 0; i < kLanes<uint64_t>; ++i) bits |= uint64_t(low[i] >= threshold) << i;
  return bits;
#endif
}

}  // namespace detail

// The words of blocks [first, first + count) of stream `seed`, 64 each.
inline void random_words(uint64_t seed, uint64_t first, int64_t count, uint32_t* words) {
  using U = Vec<uint64_t>;
  detail::for_random_words(PhiloxKeys(seed), first, count, [&](int64_t b, int lane, int w, U even, U odd) {
    const U both = (even & 0xffffffff) | (odd << 32);
    std::memcpy(words + b * kPhiloxBlock + 16 * w + lane, &both, sizeof both);
  });
}

// Whether the words of the same blocks are at least `threshold`: bit i of bits[b] for word i of block first + b.
inline void random_bits(const PhiloxKeys& keys, uint64_t first, int64_t count, uint32_t threshold, uint64_t* bits) {
  using U = Vec<uint64_t>;
  for (int64_t b = 0; b < count; ++b) bits[b] = 0;
  detail::for_random_words(keys, first, count, [&](int64_t b, int lane, int w, U even, U odd) {
#if defined(__AVX512F__)
    const __m512i both = _mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_ENUM(0xA0));
    const uint64_t kept = _mm512_cmpge_epu32_mask(both, _mm512_set1_epi32(int(threshold)));
#else
    const auto at_least = (Vec<uint32_t>)((even & 0xffffffff) | (odd << 32)) >= Vec<uint32_t>{} + threshold;
#if defined(__AVX2__)
    const uint64_t kept = uint64_t(_mm256_movemask_ps((__m256)at_least));
#elif defined(__SSE2__)
    const uint64_t kept = uint64_t(_mm_movemask_ps((__m128)at_least));
#else
    uint64_t kept = 0;
    for (int i = 0; i < kLanes<uint32_t>; ++i) kept |= uint64_t(at_least[i] & 1) << i;
#endif
#endif
    bits[b] |= kept << (16 * w + lane);
  });
}

// The same for the first `words` <= 16 words of every stride-th block: `rows` blocks from `first` on, bits `ld` apart. Draws
// nothing but these, where random_bits would draw 64 for each row.
inline void random_bits_of_rows(const PhiloxKeys& keys, uint64_t first, int64_t stride, int64_t rows, int words,
                                uint32_t threshold, uint64_t* bits, int64_t ld) {
  using U = Vec<uint64_t>;
  constexpr int n = kLanes<uint64_t>, kVectors = 4, kCounters = 32;
  uint64_t counters[kCounters] = {};  // of as many rows as fit, row after row
  const int together = kCounters / words;
  for (int i = 0; i < together * words; ++i) counters[i] = uint64_t(i / words * stride * 16 + i % words);
  for (int64_t r = 0; r < rows; r += together) {
    uint64_t kept = 0;
    for (int i = 0; i < kCounters; i += kVectors * n) {
      U counter[kVectors], word[kVectors][4];
      IUMAD_UNROLL for (int v = 0; v < kVectors; ++v) counter[v] =
          load(counters + i + v * n) + 16 * (first + uint64_t(r * stride));
      detail::philox(keys, counter, word);
      IUMAD_UNROLL for (int v = 0; v < kVectors; ++v) kept |= detail::lanes_at_least(word[v][0], threshold) << (i + v * n);
    }
    for (int64_t i = r; i < r + together && i < rows; ++i, kept >>= words) bits[i * ld] = kept & ((uint64_t(1) << words) - 1);
  }
}

// The lanes of x whose bit is set, 0 in the others: lane i goes with bit i.
template <class F>
inline Vec<F> where_set(uint64_t bits, Vec<F> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(F) == 4) return (Vec<F>)_mm512_maskz_mov_ps(__mmask16(bits), (__m512)x);
  if constexpr (sizeof(F) == 8) return (Vec<F>)_mm512_maskz_mov_pd(__mmask8(bits), (__m512d)x);
#else
  using I = Vec<IntOf<F> >;
  I bit;
  for (int i = 0; i < kLanes<F>; ++i) bit[i] = IntOf<F>(1) << i;
  return ((I{} + IntOf<F>(bits & 0xffff)) & bit) != 0 ? x : Vec<F>{};
#endif
}

}  // namespace iumad::IUMAD_ISA
