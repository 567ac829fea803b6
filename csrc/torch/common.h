// What every binding needs of torch's stable ABI: typed views of tensors, threads, sums in a fixed order.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstring>
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

// For tests: new CPU tensors hold NaN, which shows in whatever no kernel writes.
inline std::atomic<bool> fill_new_tensors = false;

// The C shim allocates without torch's dispatcher, whose calls by name cost a small op a quarter of its time.
inline Tensor empty_strided(const Tensor& like, const Shape& shape, const Shape& strides, ScalarType dtype) {
  int32_t device, index;
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle result;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(), type, device, index, &result));
  Tensor t(result);
  const bool fill = fill_new_tensors && device == aoti_torch_device_type_cpu() && t.numel() > 0;
  if (fill) std::memset(t.data_ptr(), 0xff, size_t(t.numel()) * t.element_size());
  return t;
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t next = 1;
  for (size_t i = shape.size(); i-- > 0; next *= shape[i] > 1 ? shape[i] : 1) strides[i] = next;
  return strides;
}

inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return empty_strided(like, shape, contiguous_strides(shape), dtype);
}

// Whether the elements fill a stretch of memory, each once, in any order of the dimensions.
inline bool is_dense(const Shape& shape, const Shape& strides) {
  std::vector<bool> taken(shape.size());
  int64_t filled = 1;
  for (size_t i = 0; i < shape.size(); ++i)  // as often as there are dimensions: take the one that continues what is filled
    for (size_t d = 0; d < shape.size(); ++d)
      if (!taken[d] && shape[d] != 1 && strides[d] == filled) {
        taken[d] = true;
        filled *= shape[d];
      }
  int64_t elements = 1;
  for (int64_t n : shape) elements *= n;
  return elements > 0 && filled == elements;
}

// torch's empty_like: with the strides of `t` where it is dense.
inline Tensor new_like(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  const Shape shape(sizes.begin(), sizes.end()), stride(strides.begin(), strides.end());
  return is_dense(shape, stride) ? empty_strided(t, shape, stride, t.scalar_type()) : torch::stable::empty_like(t);
}

inline Tensor zeros(const Tensor& like, const Shape& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

// An uninitialised grid: channels-last where the channels of `like` are neighbours in memory, else contiguous.
inline Tensor empty_grid(const Tensor& like, int64_t height, int64_t width) {
  const int64_t batch = like.size(0), channels = like.size(1);
  const Shape shape = {batch, channels, height, width};
  if (like.stride(1) != 1) return empty(like, shape, like.scalar_type());
  const Shape s = contiguous_strides({batch, height, width, channels});
  return empty_strided(like, shape, {s[0], s[3], s[1], s[2]}, like.scalar_type());
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
