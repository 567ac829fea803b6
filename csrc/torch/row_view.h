// RowsView of a tensor: its last dimension is the row, the others are merged where their strides allow.
#pragma once

#include "../core/row_view.h"
#include "common.h"

namespace iumad {

inline RowsView rows_view(const Tensor& t) {
  const bool is_bool = t.scalar_type() == ScalarType::Bool;
  RowsView v{t.data_ptr(), is_bool ? DType::kFloat32 : dtype_of(t), 0, 0, {}, {}};
  const auto sizes = t.sizes(), strides = t.strides();
  const int64_t last = int64_t(sizes.size()) - 1;
  v.inner_stride = sizes[last] == 1 ? 1 : strides[last];
  for (int64_t d = 0; d < last; ++d) {
    if (sizes[d] == 1) continue;
    if (v.dims > 0 && v.stride[v.dims - 1] == strides[d] * sizes[d]) {
      v.size[v.dims - 1] *= sizes[d];
      v.stride[v.dims - 1] = strides[d];
      continue;
    }
    STD_TORCH_CHECK(v.dims < RowsView::kMaxDims, "iumad_kernels: more than ", RowsView::kMaxDims, " dimensions of rows");
    v.size[v.dims] = sizes[d];
    v.stride[v.dims++] = strides[d];
  }
  return v;
}

inline int64_t count_rows(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) rows *= t.size(d);
  return rows;
}

}  // namespace iumad
