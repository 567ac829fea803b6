// What every binding needs of torch's stable ABI: typed views of tensors, threads, sums in a fixed order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../core/dtype.h"

namespace iumad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "iumad_kernels: float32, bfloat16, float16 or float64 tensors, got another dtype");
  }
}

inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}
inline Tensor zeros(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

using torch::stable::empty_like;  // keeps the strides where they are dense

// An uninitialised grid: channels-last where the channels of `like` are neighbours in memory, else contiguous.
inline Tensor empty_grid(const Tensor& like, int64_t height, int64_t width) {
  const int64_t batch = like.size(0), channels = like.size(1);
  if (like.stride(1) != 1) return empty(like, {batch, channels, height, width}, like.scalar_type());
  using torch::stable::transpose;
  return transpose(transpose(empty(like, {batch, height, width, channels}, like.scalar_type()), 2, 3), 1, 2);
}

inline void* data(const std::optional<Tensor>& t) { return t ? t->data_ptr() : nullptr; }

// Runs f(begin, end) over [0, tasks) on torch's threads.
template <class F>
void parallel(int64_t tasks, const F& f, int64_t grain = 1) {
  if (tasks > 0) torch::stable::parallel_for(0, tasks, grain, f);
}

namespace detail {
template <class T>
void sum_parts(const T* part, int64_t parts, int64_t size, T* out) {
  parallel(
      size,
      [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) out[i] = parts > 0 ? part[i] : T(0);
        for (int64_t p = 1; p < parts; ++p)
          for (int64_t i = begin; i < end; ++i) out[i] += part[p * size + i];
      },
      4096);
}
}  // namespace detail

// Sum over the first dimension of a contiguous float or double tensor, always in the order 0, 1, 2, ...
inline Tensor sum_parts(const Tensor& parts) {
  if (parts.size(0) == 1) return torch::stable::select(parts, 0, 0);
  const auto sizes = parts.sizes();
  Tensor out = empty(parts, Shape(sizes.begin() + 1, sizes.end()), parts.scalar_type());
  if (parts.scalar_type() == ScalarType::Double) {
    detail::sum_parts(static_cast<const double*>(parts.data_ptr()), parts.size(0), out.numel(),
                      static_cast<double*>(out.data_ptr()));
  } else {
    detail::sum_parts(static_cast<const float*>(parts.data_ptr()), parts.size(0), out.numel(),
                      static_cast<float*>(out.data_ptr()));
  }
  return out;
}

}  // namespace iumad
