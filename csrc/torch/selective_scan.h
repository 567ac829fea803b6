// torch.ops.iumad.selective_scan, what its CPU and CUDA implementations share: from tensors to the params struct, and the form of
// the results. Arguments arrive checked and normalised by iumad_kernels/ops/selective_scan.py, which documents their shapes.
#pragma once

#include <tuple>

#include "../core/selective_scan.h"
#include "common.h"

namespace iumad {

using ForwardResults = std::tuple<Tensor, Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline TokenView grid_view(const Tensor& t) {  // (batch, channel, row, column)
  return {t.data_ptr(), dtype_of(t), t.stride(0), 0, t.stride(1), t.stride(2), t.stride(3)};
}

inline TokenView direction_grid_view(const Tensor& t) {  // (batch, direction or 1, channel, row, column)
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

inline StateView state_view(const Tensor& t) {  // (batch, direction, channel, state)
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline ProjectionView projection_view(const Tensor& t) {
  if (t.dim() == 3) return {t.data_ptr(), dtype_of(t), true, 0, 0, 0, 0, 0};  // (direction, channel, state)
  return {t.data_ptr(), dtype_of(t), false, t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

inline SelectiveScan describe(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                              const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                              const std::optional<Tensor>& delta_bias, int64_t scheme, int64_t step, bool delta_softplus) {
  SelectiveScan s{};
  s.batch = u.size(0);
  s.dim = u.size(1);
  s.states = A.size(2);
  s.groups = B.dim() == 3 ? (C.dim() == 3 ? 1 : C.size(2)) : B.size(2);
  s.delta_rows = delta.size(2);
  s.order = {static_cast<ScanScheme>(scheme), step, u.size(2), u.size(3)};
  s.delta_softplus = delta_softplus;
  s.is_double = u.scalar_type() == ScalarType::Double;
  s.u = grid_view(u);
  s.delta = direction_grid_view(delta);
  if (z) s.z = grid_view(*z);
  s.A = A.data_ptr();
  s.D = data(D);
  s.delta_bias = data(delta_bias);
  s.B = projection_view(B);
  s.C = projection_view(C);
  return s;
}

inline Shape last_state_shape(const SelectiveScan& s) { return {s.batch, s.order.directions(), s.dim, s.states}; }

inline ScalarType compute_type(const SelectiveScan& s) { return s.is_double ? ScalarType::Double : ScalarType::Float; }

// Directions that meet at a pixel add up there; 16-bit results are added up in float32 and rounded once.
inline bool accumulates_in_float(const SelectiveScan& s, const Tensor& like) {
  return s.order.overlaps() && like.element_size() == 2;
}

inline Tensor result_like(const SelectiveScan& s, const Tensor& like) {
  return accumulates_in_float(s, like) ? torch::stable::to(empty_like(like), ScalarType::Float) : empty_like(like);
}

inline Tensor finished(const Tensor& result, const Tensor& like) {
  return result.scalar_type() == like.scalar_type() ? result : torch::stable::to(result, like.scalar_type());
}

// With disjoint directions (es2d) a tensor that has a slice per direction gets gradients only at that direction's pixels.
inline bool disjoint(const SelectiveScan& s) { return s.order.directions() > 1 && !s.order.overlaps(); }

// The gradients that have the form of their tensor or a partial sum per batch entry: allocated and entered into `d`.
struct Results {
  Tensor u, delta, z, A, D, delta_bias;  // empty where the argument is absent
};

inline Results allocate_results(const SelectiveScan& s, SelectiveScanGradients& d, const Tensor& grad_out,
                                const std::optional<Tensor>& grad_last_state, const Tensor& u, const Tensor& delta,
                                const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                const std::optional<Tensor>& delta_bias) {
  const int64_t K = s.order.directions(), delta_directions = delta.size(1);
  const ScalarType compute = compute_type(s);
  const auto absent = [&] { return empty(u, {0}, compute); };  // results must not share memory
  Results r{result_like(s, u),
            absent(),
            z ? result_like(s, *z) : absent(),
            empty(u, {s.batch, K, s.dim, s.states}, compute),
            D ? empty(u, {s.batch, K, s.dim}, compute) : absent(),
            delta_bias ? empty(u, {s.batch, K, s.dim}, compute) : absent()};
  const bool holes = disjoint(s) && delta_directions > 1;
  if (s.delta_rows == s.dim && !holes) {
    r.delta = delta_directions == 1 ? result_like(s, delta) : empty_like(delta);
  } else {
    const Shape shape = {s.batch, delta_directions, s.dim, u.size(2), u.size(3)};
    r.delta = holes ? zeros(u, shape, compute) : empty(u, shape, compute);
  }
  d.out = grid_view(grad_out);
  if (grad_last_state) d.last_state = state_view(*grad_last_state);
  d.u = grid_view(r.u);
  d.delta = direction_grid_view(r.delta);
  if (z) d.z = grid_view(r.z);
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
          r.delta.size(2) == s.delta_rows ? finished(r.delta, delta) : r.delta,
          sum(r.A),
          dB,
          dC,
          r.D.dim() > 1 ? sum(r.D) : r.D,
          z ? finished(r.z, *z) : r.z,
          r.delta_bias.dim() > 1 ? sum(r.delta_bias) : r.delta_bias,
          initial_state};
}

}  // namespace iumad
