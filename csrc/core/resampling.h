// Rows of a linear resampling: bilinear interpolation (align_corners) followed by Gaussian smoothing.
#pragma once

#include <cstdint>
#include <vector>

namespace iumad {

struct Resampling {
  std::vector<int64_t> first;  // see SparseRows
  std::vector<int32_t> index;
  std::vector<double> weight;
};

// From `in` samples to `out`; sigma in output samples, 0: no smoothing. The Gaussian is cut off at round(4 sigma) samples and
// mirrored at the borders with the border sample repeated (the defaults of scipy.ndimage.gaussian_filter).
Resampling bilinear_gaussian(int64_t in, int64_t out, double sigma);

// The same matrix with its rows and columns exchanged.
Resampling transposed(const Resampling& m, int64_t columns);

}  // namespace iumad
