// The variational bottleneck (Alemi et al., arXiv 1612.00410): a sample of N(mu, sigma^2) and its KL from N(m, s^2), row by row.
//
//   sigma = exp(logvar / 2)      sample = mu + sigma eps      kl = 1/2 sum_j ((sigma^2 + (mu - m)^2) / s^2 - 1 - log(sigma^2 /
//   s^2)) dmu = dsample + dkl (mu - m) / s^2      dlogvar = dsample sigma eps / 2 + dkl (sigma^2 / s^2 - 1) / 2
//
// eps is normal.h's: element (row, column) takes normal number row * roundup(columns, 64) + column of the seed's stream, so
// backward draws it again and nothing is stored.
#pragma once

#include "dispatch.h"
#include "row_view.h"

namespace iumad {

struct GaussianBottleneck {
  int64_t rows, columns;
  bool is_double;
  uint64_t seed;
  double prior_mean, prior_std;
  RowsView mu, logvar;
};

struct GaussianGradients {
  RowsView sample;  // gradient of the sample; data may be null: zero
  const void* kl;   // gradient of row i's KL at [i * kl_stride], compute type; null: zero
  int64_t kl_stride;
  RowsView mu, logvar;  // results
};

struct GaussianBottleneckKernels {
  // Rows are independent: any split of [0, rows) over any threads gives the same bits. kl: (rows) of the compute type.
  void (*forward)(const GaussianBottleneck&, const RowsView& sample, void* kl, int64_t begin, int64_t end);
  void (*backward)(const GaussianBottleneck&, const GaussianGradients&, int64_t begin, int64_t end);
};

IUMAD_DECLARE_KERNELS(GaussianBottleneckKernels, gaussian_bottleneck)

}  // namespace iumad
