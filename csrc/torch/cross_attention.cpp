// torch.ops.iumad.cross_attention and its backward. Arguments arrive checked and normalised by
// iumad_kernels/ops/cross_attention.py, which documents their shapes.
#include "../core/cross_attention.h"

#include <tuple>

#include "common.h"

namespace iumad {
namespace {

HeadView head_view(const Tensor& t) {  // (batch, head, token, feature)
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

HeadView part_view(const Tensor& t) {  // (part, batch, head, token, feature)
  return {t.data_ptr(), dtype_of(t), t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

MaskView mask_view(const Tensor& t) {  // 1 broadcasts
  const bool is_bool = t.scalar_type() == ScalarType::Bool;
  const auto stride = [&](int64_t d) { return t.size(d) == 1 ? 0 : t.stride(d); };
  return {t.data_ptr(), is_bool, is_bool ? DType::kFloat32 : dtype_of(t), stride(0), stride(1), stride(2), stride(3)};
}

CrossAttention describe(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& seed, double dropout_p, bool causal, double scale) {
  CrossAttention s{};
  s.batch = query.size(0);
  s.heads = query.size(1);
  s.key_heads = key.size(1);
  s.queries = query.size(2);
  s.keys = key.size(2);
  s.dim = query.size(3);
  s.value_dim = value.size(3);
  s.scale = scale;
  s.dropout_p = dropout_p;
  s.causal = causal;
  s.is_double = query.scalar_type() == ScalarType::Double;
  if (seed) s.seed = uint64_t(*static_cast<const int64_t*>(seed->data_ptr()));
  s.query = head_view(query);
  s.key = head_view(key);
  s.value = head_view(value);
  if (mask) s.mask = mask_view(*mask);
  return s;
}

ScalarType compute_type(const CrossAttention& s) { return s.is_double ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const std::optional<Tensor>& mask, const std::optional<Tensor>& seed, double dropout_p,
                                           bool causal, double scale, bool need_weights) {
  CrossAttention s = describe(query, key, value, mask, seed, dropout_p, causal, scale);
  // Tokens before heads in memory: merging the heads, which follows in every model, is then a view.
  Tensor out = torch::stable::transpose(empty(query, {s.batch, s.queries, s.heads, s.value_dim}, query.scalar_type()), 1, 2);
  const Shape weights_shape = need_weights ? Shape{s.batch, s.queries, s.keys} : Shape{0};
  Tensor weights = s.heads > 0 ? empty(query, weights_shape, compute_type(s)) : zeros(query, weights_shape, compute_type(s));
  Tensor lse = empty(query, {s.batch, s.heads, s.queries}, compute_type(s));
  s.out = head_view(out);
  s.lse = lse.data_ptr();
  if (need_weights && weights.numel() > 0) s.weights = weights.data_ptr();
  const CrossAttentionKernels& kernels = cross_attention_kernels(dtype_of(query));
  parallel(kernels.forward_tasks(s), [&](int64_t begin, int64_t end) { kernels.forward(s, begin, end); });
  return {out, weights, lse};
}

// Sum in a fixed order over what the mask is broadcast: (batch, heads, rows, columns) -> the mask's shape.
template <class F>
void reduce_mask_grad(const Tensor& grad, const Tensor& result) {
  const F* from = static_cast<const F*>(grad.data_ptr());
  F* to = static_cast<F*>(result.data_ptr());
  const int64_t size[4] = {grad.size(0), grad.size(1), grad.size(2), grad.size(3)};
  const int64_t out[4] = {result.size(0), result.size(1), result.size(2), result.size(3)};
  parallel(out[0] * out[1] * out[2], [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b0 = row / out[2] / out[1], h0 = row / out[2] % out[1], q0 = row % out[2];
      F* sum = to + row * out[3];
      for (int64_t j = 0; j < out[3]; ++j) sum[j] = F(0);
      for (int64_t b = out[0] == 1 ? 0 : b0; b < (out[0] == 1 ? size[0] : b0 + 1); ++b)
        for (int64_t h = out[1] == 1 ? 0 : h0; h < (out[1] == 1 ? size[1] : h0 + 1); ++h)
          for (int64_t q = out[2] == 1 ? 0 : q0; q < (out[2] == 1 ? size[2] : q0 + 1); ++q) {
            const F* part = from + ((b * size[1] + h) * size[2] + q) * size[3];
            for (int64_t j = 0; j < out[3]; ++j) sum[j] += part[j];
          }
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_weights, const Tensor& query, const Tensor& key,
                   const Tensor& value, const std::optional<Tensor>& mask, const std::optional<Tensor>& seed, const Tensor& out,
                   const Tensor& lse, double dropout_p, bool causal, double scale, bool mask_grad) {
  CrossAttention s = describe(query, key, value, mask, seed, dropout_p, causal, scale);
  const CrossAttentionKernels& kernels = cross_attention_kernels(dtype_of(query));
  const ScalarType compute = compute_type(s);
  s.out = head_view(out);
  s.lse = lse.data_ptr();
  CrossAttentionGradients d{};
  d.out = head_view(grad_out);
  if (grad_weights) d.weights = grad_weights->data_ptr();
  const int64_t parts = kernels.backward_parts(s, d.weights != nullptr);

  Tensor dquery = new_like(query), dkey = new_like(key), dvalue = new_like(value);
  d.query = head_view(dquery);
  Tensor key_parts, value_parts;
  if (parts == 1) {
    d.key = head_view(dkey);
    d.value = head_view(dvalue);
  } else {
    key_parts = empty(query, {parts, s.batch, s.key_heads, s.keys, s.dim}, compute);
    value_parts = empty(query, {parts, s.batch, s.key_heads, s.keys, s.value_dim}, compute);
    d.key = part_view(key_parts);
    d.value = part_view(value_parts);
    d.key_part = key_parts.stride(0);
    d.value_part = value_parts.stride(0);
  }
  Tensor mask_sum, mask_parts;
  if (mask_grad) {
    d.mask_has_queries = mask->size(2) != 1;
    d.mask_has_keys = mask->size(3) != 1;
    mask_parts = zeros(query, {s.batch, s.heads, d.mask_has_queries ? s.queries : parts, d.mask_has_keys ? s.keys : 1}, compute);
    if (mask_parts.numel() > 0) d.mask = mask_parts.data_ptr();
  }

  parallel(kernels.backward_tasks(s, d.weights != nullptr),
           [&](int64_t begin, int64_t end) { kernels.backward(s, d, begin, end); });

  if (parts != 1) {
    torch::stable::copy_(dkey, sum_parts(key_parts));
    torch::stable::copy_(dvalue, sum_parts(value_parts));
  }
  if (mask_grad) {
    mask_sum = empty(query, {mask->size(0), mask->size(1), mask->size(2), mask->size(3)}, compute);
    s.is_double ? reduce_mask_grad<double>(mask_parts, mask_sum) : reduce_mask_grad<float>(mask_parts, mask_sum);
    mask_sum = torch::stable::to(mask_sum, mask->scalar_type());
  } else {
    mask_sum = empty(query, {0}, compute);
  }
  return {dquery, dkey, dvalue, mask_sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "cross_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? seed, float dropout_p, bool is_causal, "
      "float scale, bool need_weights) -> (Tensor out, Tensor weights, Tensor lse)");
  m.def(
      "cross_attention_backward(Tensor grad_out, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, Tensor? "
      "attn_mask, "
      "Tensor? seed, Tensor out, Tensor lse, float dropout_p, bool is_causal, float scale, bool mask_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iumad, CPU, m) {
  m.impl("cross_attention", TORCH_BOX(&forward));
  m.impl("cross_attention_backward", TORCH_BOX(&backward));
}

}  // namespace iumad
