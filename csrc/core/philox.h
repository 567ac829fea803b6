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

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace iumad::IUMAD_ISA {

constexpr int kPhiloxBlock = 64;  // words

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

// Ten rounds on one counter per 64-bit lane; each of the four words occupies the low half of its lane (the high half is noise).
inline void philox(uint64_t seed, Vec<uint64_t> counter, Vec<uint64_t> (&word)[4]) {
  using U = Vec<uint64_t>;
  const U multiplier0 = U{} + 0xD2511F53u, multiplier1 = U{} + 0xCD9E8D57u;
  U c0 = counter, c1 = counter >> 32, c2{}, c3{};
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const U product0 = multiply_low_halves(c0, multiplier0), product1 = multiply_low_halves(c2, multiplier1);
    c0 = (product1 >> 32) ^ c1 ^ (U{} + key0);
    c2 = (product0 >> 32) ^ c3 ^ (U{} + key1);
    c1 = product1;
    c3 = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

}  // namespace detail

// The words of blocks [first, first + count) of stream `seed`, 64 each.
inline void random_words(uint64_t seed, uint64_t first, int64_t count, uint32_t* words) {
  using U = Vec<uint64_t>;
  constexpr int n = kLanes<uint64_t>;
  U even;  // counters 0, 2, 4, ...: with the odd ones in the upper halves the words come out in order
  for (int lane = 0; lane < n; ++lane) even[lane] = uint64_t(2 * lane);
  for (int64_t b = 0; b < count; ++b) {
    for (int lane = 0; lane < 16; lane += 2 * n) {
      const U counter = even + (16 * (first + uint64_t(b)) + uint64_t(lane));
      U low[4], high[4];
      detail::philox(seed, counter, low);
      detail::philox(seed, counter + 1, high);
      for (int w = 0; w < 4; ++w) {
        const U both = (low[w] & 0xffffffff) | (high[w] << 32);
        std::memcpy(words + b * kPhiloxBlock + 16 * w + lane, &both, sizeof both);
      }
    }
  }
}

}  // namespace iumad::IUMAD_ISA
