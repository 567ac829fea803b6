// Standard normal numbers by position: the Box-Muller transform of the words of philox.h. Every backend has to reproduce this:
//
//   normals 64 b .. 64 b + 63 come from words 64 b .. 64 b + 63; with x, y = words 64 b + 32 i + lane and 64 b + 32 i + 16 + lane
//   (i = 0, 1; lane = 0 .. 15; outputs 2 i and 2 i + 1 of one Philox counter)
//     r = sqrt(-2 log((floor(x / 2^9) + 1/2) / 2^23)),  a = 2 pi floor(y / 2^9) / 2^23
//     normal 64 b + 32 i + lane = r cos a,  normal 64 b + 32 i + 16 + lane = r sin a
//
// The two uniform numbers are exact in float and double, so all dtypes draw the same numbers up to rounding; |normal| < 5.77.
// In plain PyTorch: iumad_kernels/reference/philox.py.
#pragma once

#include "math.h"
#include "philox.h"

namespace iumad::IUMAD_ISA {

constexpr int kNormalBlock = kPhiloxBlock;

// The normals of block `block` of stream `seed`.
template <class F>
inline void normal_block(uint64_t seed, uint64_t block, F* normals) {
  uint32_t words[kPhiloxBlock];
  F uniform[kPhiloxBlock];
  random_words(seed, block, 1, words);
  for (int i = 0; i < kPhiloxBlock; ++i) uniform[i] = F(int32_t(words[i] >> 9));
  const Vec<F> unit = broadcast(F(0x1p-23));
  for (int first = 0; first < kPhiloxBlock; first += 32) {
    for (int lane = 0; lane < 16; lane += kLanes<F>) {
      const Vec<F> x = load(uniform + first + lane), y = load(uniform + first + 16 + lane);
      const Vec<F> r = sqrt<F>(broadcast(F(-2)) * log<F>((x + broadcast(F(0.5))) * unit));
      const CosSin<F> a = cos_sin_turns<F>(y * unit);
      store<F>(normals + first + lane, r * a.cos);
      store<F>(normals + first + 16 + lane, r * a.sin);
    }
  }
}

}  // namespace iumad::IUMAD_ISA
