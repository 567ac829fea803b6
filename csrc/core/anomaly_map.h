// Anomaly map and image score from two feature grids, forward and backward:
//
//   d(i, j)   = || features(:, i, j) - reference(:, i, j) ||_2
//   map(y, x) = sum_{i, j} Y(y, i) X(x, j) d(i, j)
//   score     = max over all pool x pool windows of the mean of map
//
// Y and X hold bilinear interpolation and, where asked, Gaussian smoothing: both are linear and separable, so that smoothing
// costs a few more taps per row instead of passes over the full-resolution map. Windows are summed while the map is written: rows
// in blocks of `pool`, a window being the tail of one block plus the head of the next (van Herk), so nothing is ever subtracted.
//
// Kept for backward: d and the first window that has the maximum. With g(y, x) = dmap(y, x) + [in that window] dscore / pool^2:
//
//   dd = Y^T g X        dfeatures = dd / d (features - reference), 0 where d = 0        dreference = -dfeatures
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace iumad {

// A matrix with few entries per row: row y has those at entries first[y] ... first[y + 1] - 1.
struct SparseRows {
  const int64_t* first;
  const int32_t* index;
  const double* weight;
};

struct FeatureView {  // (batch, channel, row, column), strides in elements
  void* data;
  DType dtype;
  int64_t batch, channel, row, column;
};

struct AnomalyMap {
  int64_t batch, channels, rows, columns;  // of the features
  int64_t height, width, pool;             // of the map
  bool is_double;
  FeatureView features, reference;
  SparseRows Y, X;          // (height, rows), (width, columns)
  SparseRows X_transposed;  // (columns, width); only backward needs it
  // In the compute type, contiguous:
  void* distance;  // (batch, rows, columns)
  void* map;       // (batch, height, width)
  void* score;     // (batch)
  int64_t* peak;   // (batch): the window's first row * width + its first column
};

struct AnomalyMapGradients {
  const void *map, *score;          // of the results, compute type; map (batch, height, width) contiguous
  void* distance;                   // (batch, rows, columns), compute type: workspace
  FeatureView features, reference;  // results; data may be null
};

struct AnomalyMapKernels {
  // The passes, in order; the tasks of each are independent. Maps and distance gradients have one task per image.
  int64_t (*feature_tasks)(const AnomalyMap&);
  void (*distances)(const AnomalyMap&, int64_t begin, int64_t end);
  void (*maps)(const AnomalyMap&, int64_t begin, int64_t end);
  void (*distance_gradients)(const AnomalyMap&, const AnomalyMapGradients&, int64_t begin, int64_t end);
  void (*feature_gradients)(const AnomalyMap&, const AnomalyMapGradients&, int64_t begin, int64_t end);
};

IUMAD_DECLARE_KERNELS(AnomalyMapKernels, anomaly_map)

}  // namespace iumad
