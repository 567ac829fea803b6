// torch.ops.iumad.selective_scan, what its CPU and CUDA implementations share: from tensors to the params struct, and the form of
// the results. Arguments arrive checked and normalised by iumad_kernels/ops/selective_scan.py, which documents their shapes.
#pragma once

#include <tuple>

#include "../core/selective_scan.h"
#include "common.h"

namespace iumad {

using ForwardResults = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Arguments come in one of two forms, told by the rank of u. A sequence: all as iumad_kernels.selective_scan takes them. A grid:
// with a dimension of directions where the comments below have one. D and delta_bias are contiguous either way, and so is A.
inline bool is_sequence(const Tensor& u) { return u.dim() == 3; }

inline TokenView token_view(const Tensor& t) {  // (batch, channel, token) or (batch, channel, row, column)
  return {t.data_ptr(), dtype_of(t), t.stride(0), 0, t.stride(1), t.dim() == 3 ? 0 : t.stride(2), t.stride(t.dim() - 1)};
}

inline TokenView delta_view(const Tensor& t) {  // as above or (batch, direction or 1, channel, row, column)
  if (t.dim() == 3) return token_view(t);
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

inline StateView state_view(const Tensor& t) {  // (batch, channel, state) or (batch, direction, channel, state)
  const int64_t channel = t.dim() - 2;
  return {t.data_ptr(), dtype_of(t), t.stride(0), channel == 1 ? 0 : t.stride(1), t.stride(channel), t.stride(channel + 1)};
}

// B or C. Constant: (channel, state) or (direction, channel, state). Varying: (batch, state, token) or (batch, group, state,
// token), or (batch, direction or 1, group, row, column, state).
inline bool is_constant(const Tensor& t, bool sequence) { return t.dim() == (sequence ? 2 : 3); }

inline int64_t groups_of(const Tensor& t, bool sequence) {
  if (sequence) return t.dim() == 4 ? t.size(1) : 1;
  return t.dim() == 6 ? t.size(2) : 1;
}

inline ProjectionView projection_view(const Tensor& t, bool sequence) {
  ProjectionView v{t.data_ptr(), dtype_of(t), is_constant(t, sequence), 0, 0, 0, 0, 0};
  if (v.constant) return v;
  v.batch = t.stride(0);
  if (sequence) {
    v.group = t.dim() == 4 ? t.stride(1) : 0;
    v.column = t.stride(t.dim() - 1);
  } else {
    v.direction = t.size(1) == 1 ? 0 : t.stride(1);
    v.group = t.stride(2);
    v.row = t.stride(3);
    v.column = t.stride(4);
  }
  return v;
}

inline SelectiveScan describe(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                              const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                              const std::optional<Tensor>& delta_bias, int64_t scheme, int64_t step, bool delta_softplus) {
  const bool sequence = is_sequence(u);
  SelectiveScan s{};
  s.batch = u.size(0);
  s.dim = u.size(1);
  s.states = A.size(A.dim() - 1);
  s.groups = groups_of(is_constant(B, sequence) ? C : B, sequence);
  s.delta_rows = delta.size(sequence ? 1 : 2);
  s.order = {static_cast<ScanScheme>(scheme), step, sequence ? 1 : u.size(2), u.size(u.dim() - 1)};
  s.delta_softplus = delta_softplus;
  s.is_double = u.scalar_type() == ScalarType::Double;
  s.u = token_view(u);
  s.delta = delta_view(delta);
  if (z) s.z = token_view(*z);
  s.A = A.data_ptr();
  s.D = data(D);
  s.delta_bias = data(delta_bias);
  s.B = projection_view(B, sequence);
  s.C = projection_view(C, sequence);
  return s;
}

// (batch, direction, ...), of which a sequence's form has no direction.
inline Shape per_batch(const SelectiveScan& s, bool sequence, const Shape& rest) {
  Shape shape = {s.batch};
  if (!sequence) shape.push_back(s.order.directions());
  shape.insert(shape.end(), rest.begin(), rest.end());
  return shape;
}
inline Shape state_shape(const SelectiveScan& s, bool sequence) { return per_batch(s, sequence, {s.dim, s.states}); }

inline void* saved_states(const Tensor& tile_states) {
  STD_TORCH_CHECK(tile_states.dim() > 1, "selective_scan_backward: the forward pass has to be called with save_states=True");
  return tile_states.data_ptr();
}

inline ScalarType compute_type(const SelectiveScan& s) { return s.is_double ? ScalarType::Double : ScalarType::Float; }

// Directions that meet at a pixel add up there; 16-bit results are added up in float32 and rounded once.
inline bool accumulates_in_float(const SelectiveScan& s, const Tensor& like) {
  return s.order.overlaps() && like.element_size() == 2;
}

inline Tensor result_like(const SelectiveScan& s, const Tensor& like) {
  return accumulates_in_float(s, like) ? torch::stable::to(new_like(like), ScalarType::Float) : new_like(like);
}

inline Tensor finished(const Tensor& result, const Tensor& like) {
  return result.scalar_type() == like.scalar_type() ? result : torch::stable::to(result, like.scalar_type());
}

// With disjoint directions (es2d) a tensor that has a slice per direction gets gradients only at that direction's pixels.
inline bool disjoint(const SelectiveScan& s) { return s.order.directions() > 1 && !s.order.overlaps(); }

// How the kernels write the gradient of a varying B or C: with the states last.
inline Shape projection_gradient_shape(const SelectiveScan& s, const Tensor& t, bool sequence) {
  if (!sequence) return {s.batch, t.size(1), s.groups, s.order.rows, s.order.columns, s.states};
  if (t.dim() == 4) return {s.batch, s.groups, s.order.columns, s.states};
  return {s.batch, s.order.columns, s.states};
}

// That gradient in the form of its tensor, whose states are before the tokens in a sequence.
inline Tensor states_first(const Tensor& gradient, const Tensor& t, bool sequence) {
  return sequence && !is_constant(t, sequence) ? torch::stable::transpose(gradient, t.dim() - 2, t.dim() - 1) : gradient;
}

// The gradients that have the form of their tensor or a partial sum per batch entry: allocated and entered into `d`.
struct Results {
  Tensor u, delta, z, A, D, delta_bias;  // empty where the argument is absent
};

inline Results allocate_results(const SelectiveScan& s, SelectiveScanGradients& d, const Tensor& grad_out,
                                const std::optional<Tensor>& grad_last_state, const Tensor& u, const Tensor& delta,
                                const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                const std::optional<Tensor>& delta_bias) {
  const bool sequence = is_sequence(u);
  const int64_t delta_directions = sequence ? 1 : delta.size(1);
  const ScalarType compute = compute_type(s);
  const auto absent = [&] { return empty(u, {0}, compute); };  // results must not share memory
  Results r{result_like(s, u),
            absent(),
            z ? result_like(s, *z) : absent(),
            empty(u, state_shape(s, sequence), compute),
            D ? empty(u, per_batch(s, sequence, {s.dim}), compute) : absent(),
            delta_bias ? empty(u, per_batch(s, sequence, {s.dim}), compute) : absent()};
  const bool holes = disjoint(s) && delta_directions > 1;
  if (s.delta_rows == s.dim && !holes) {
    r.delta = delta_directions == 1 ? result_like(s, delta) : new_like(delta);
  } else {
    const Shape shape =
        sequence ? Shape{s.batch, s.dim, u.size(2)} : Shape{s.batch, delta_directions, s.dim, u.size(2), u.size(3)};
    r.delta = holes ? zeros(u, shape, compute) : empty(u, shape, compute);
  }
  d.out = token_view(grad_out);
  if (grad_last_state) d.last_state = state_view(*grad_last_state);
  d.u = token_view(r.u);
  d.delta = delta_view(r.delta);
  if (z) d.z = token_view(r.z);
  d.A = r.A.data_ptr();
  if (D) d.D = r.D.data_ptr();
  if (delta_bias) d.delta_bias = r.delta_bias.data_ptr();
  return r;
}

// The gradients in the order of the op's results; `sum` adds partial sums over their first dimension.
template <class Sum>
Gradients finished_results(const SelectiveScan& s, const Results& r, const Tensor& u, const Tensor& delta,
                           const std::optional<Tensor>& z, const Tensor& dB, const Tensor& dC, const Tensor& initial_state,
                           Sum&& sum) {
  return {finished(r.u, u),
          s.delta_rows == s.dim ? finished(r.delta, delta) : r.delta,
          sum(r.A),
          dB,
          dC,
          r.D.dim() > 1 ? sum(r.D) : r.D,
          z ? finished(r.z, *z) : r.z,
          r.delta_bias.dim() > 1 ? sum(r.delta_bias) : r.delta_bias,
          initial_state};
}

}  // namespace iumad
