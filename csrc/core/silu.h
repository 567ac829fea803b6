// SiLU, z sigmoid(z), of runs of vectors. Functions that are called, for there is one per length of a run where inlined there
// would be one per kernel of the convolution too.
#pragma once

#include "math.h"

namespace iumad::IUMAD_ISA {

// out = z sigmoid(z); vectors of `out`, which may be z, lie `column` values apart.
template <class F, int kRun>
[[gnu::noinline]] void silu(const F* z, F* out, int64_t column) {
  Vec<F> gate[kRun];
  sigmoid(z, gate);
  IUMAD_UNROLL for (int t = 0; t < kRun; ++t) store<F>(out + t * column, load(z + t * kLanes<F>) * gate[t]);
}

// dz = dout times the derivative at z; dz may be dout.
template <class F, int kRun>
[[gnu::noinline]] void differentiate_silu(const F* z, const F* dout, int64_t column, F* dz, int64_t dz_column) {
  const Vec<F> one = broadcast(F(1));
  Vec<F> gate[kRun];
  sigmoid(z, gate);
  IUMAD_UNROLL
  for (int t = 0; t < kRun; ++t) {
    const Vec<F> slope = gate[t] * fma(load(z + t * kLanes<F>), one - gate[t], one);
    store<F>(dz + t * dz_column, load(dout + t * column) * slope);
  }
}

}  // namespace iumad::IUMAD_ISA
