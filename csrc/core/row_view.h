// Rows of a tensor whose last dimension is `size` long, with any strides: where row i starts.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace iumad {

struct RowsView {
  static constexpr int kMaxDims = 6;
  void* data;  // may be null: absent
  DType dtype;
  int64_t inner_stride;  // between neighbours inside a row; strides are in elements
  int dims;              // outer dimensions
  int64_t size[kMaxDims], stride[kMaxDims];

  int64_t offset(int64_t row) const {
    int64_t sum = 0;
    for (int d = dims - 1; d > 0; --d) {
      sum += row % size[d] * stride[d];
      row /= size[d];
    }
    return dims > 0 ? sum + row * stride[0] : sum;
  }
};

}  // namespace iumad
