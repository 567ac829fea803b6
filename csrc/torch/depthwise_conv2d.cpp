// torch.ops.iumad.depthwise_conv2d: the one op behind the 2-D depthwise and the 1-D causal convolution.
// Arguments arrive checked and normalised by iumad_kernels/ops/{depthwise_conv2d,causal_conv1d}.py, which document their shapes.
#include "../core/depthwise_conv2d.h"

#include <tuple>

#include "common.h"

namespace iumad {
namespace {

GridView grid_view(const Tensor& t) {  // (batch, channel, row, column)
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

DepthwiseConv2d describe(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         const std::optional<Tensor>& history, const std::optional<Tensor>& sequence, int64_t stride,
                         int64_t pad_top, int64_t pad_left, bool silu) {
  DepthwiseConv2d s{};
  s.batch = x.size(0);
  s.channels = x.size(1);
  s.height = x.size(2);
  s.width = x.size(3);
  s.kernel_height = weight.size(2);
  s.kernel_width = weight.size(3);
  s.stride = stride;
  s.pad_top = pad_top;
  s.pad_left = pad_left;
  s.silu = silu;
  s.is_double = x.scalar_type() == ScalarType::Double;
  s.x = grid_view(x);
  s.weight = {weight.data_ptr(), dtype_of(weight), 0, weight.stride(0), weight.stride(2), weight.stride(3)};
  if (bias) s.bias = {bias->data_ptr(), dtype_of(*bias), 0, bias->stride(0), 0, 0};
  if (history) s.history = grid_view(*history);
  s.sequence = static_cast<const int32_t*>(data(sequence));
  return s;
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& history,
               const std::optional<Tensor>& sequence, int64_t stride, int64_t pad_top, int64_t pad_left, bool silu) {
  DepthwiseConv2d s = describe(x, weight, bias, history, sequence, stride, pad_top, pad_left, silu);
  Tensor out = empty_grid(x, s.out_height(), s.out_width());
  s.out = grid_view(out);
  if (out.numel() == 0) return out;
  const DepthwiseConv2dKernels& kernels = depthwise_conv2d_kernels();
  parallel(kernels.forward_tasks(s), [&](int64_t begin, int64_t end) { kernels.forward(s, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& history,
                                                    const std::optional<Tensor>& sequence, int64_t stride, int64_t pad_top,
                                                    int64_t pad_left, bool silu) {
  DepthwiseConv2d s = describe(x, weight, bias, history, sequence, stride, pad_top, pad_left, silu);
  const DepthwiseConv2dKernels& kernels = depthwise_conv2d_kernels();
  const ScalarType compute = s.is_double ? ScalarType::Double : ScalarType::Float;
  const bool any = x.numel() > 0;
  const int64_t parts = any ? kernels.backward_parts(s) : 1;
  const Shape weight_shape = {parts, s.channels, 1, s.kernel_height, s.kernel_width};
  Tensor dx = empty_grid(x, s.height, s.width);
  Tensor dhistory = history ? empty_grid(*history, 1, history->size(3)) : empty(x, {0}, x.scalar_type());
  Tensor dweight = any ? empty(x, weight_shape, compute) : zeros(x, weight_shape, compute);
  Tensor dbias = any ? empty(x, {parts, bias ? s.channels : 0}, compute) : zeros(x, {parts, bias ? s.channels : 0}, compute);
  if (any) {
    DepthwiseConv2dGradients d{};
    d.out = grid_view(grad_out);
    d.x = grid_view(dx);
    if (history) d.history = grid_view(dhistory);
    d.weight = dweight.data_ptr();
    if (bias) d.bias = dbias.data_ptr();
    parallel(kernels.backward_tasks(s), [&](int64_t begin, int64_t end) { kernels.backward(s, d, begin, end); });
  } else if (history) {
    torch::stable::zero_(dhistory);
  }
  const auto finished = [&](const Tensor& parts_of, const Tensor& like) {
    Tensor sum = sum_parts(parts_of);
    return sum.scalar_type() == like.scalar_type() ? sum : torch::stable::to(sum, like.scalar_type());
  };
  return {dx, finished(dweight, weight), finished(dbias, bias ? *bias : x), dhistory};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? sequence, int stride, int pad_top, "
      "int pad_left, bool silu) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor? history, Tensor? sequence, "
      "int stride, int pad_top, int pad_left, bool silu) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iumad, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&forward));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&backward));
}

}  // namespace iumad
