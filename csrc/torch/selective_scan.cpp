// torch.ops.iumad.selective_scan: the one op behind the 1-D scan, the 2-D scan and the single-step update.
// Arguments arrive checked and normalised by iumad_kernels/ops/selective_scan.py, which documents their shapes.
#include "../core/selective_scan.h"

#include <tuple>

#include "common.h"

namespace iumad {
namespace {

TokenView grid_view(const Tensor& t) {  // (batch, channel, row, column)
  return {t.data_ptr(), dtype_of(t), t.stride(0), 0, t.stride(1), t.stride(2), t.stride(3)};
}

TokenView direction_grid_view(const Tensor& t) {  // (batch, direction or 1, channel, row, column)
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

StateView state_view(const Tensor& t) {  // (batch, direction, channel, state)
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

ProjectionView projection_view(const Tensor& t) {
  if (t.dim() == 3) return {t.data_ptr(), true, 0, 0, 0, 0, 0};  // (direction, channel, state)
  return {t.data_ptr(), false, t.stride(0), t.size(1) == 1 ? 0 : t.stride(1), t.stride(2), t.stride(3), t.stride(4)};
}

SelectiveScan describe(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                       int64_t scheme, int64_t step, bool delta_softplus) {
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

ScalarType compute_type(const SelectiveScan& s) { return s.is_double ? ScalarType::Double : ScalarType::Float; }

Shape tile_states_shape(const SelectiveScan& s) {
  return {s.batch, s.order.directions(), s.chunks(), s.tiles(), s.states, kScanChunk};
}

// Directions that meet at a pixel add up there; 16-bit results are added up in float32 and rounded once.
bool accumulates_in_float(const SelectiveScan& s, const Tensor& like) { return s.order.overlaps() && like.element_size() == 2; }

Tensor result_like(const SelectiveScan& s, const Tensor& like) {
  return accumulates_in_float(s, like) ? torch::stable::to(empty_like(like), ScalarType::Float) : empty_like(like);
}

Tensor finished(const Tensor& result, const Tensor& like) {
  return result.scalar_type() == like.scalar_type() ? result : torch::stable::to(result, like.scalar_type());
}

void run_forward(const SelectiveScan& s) {
  const SelectiveScanKernels& kernels = selective_scan_kernels();
  parallel(kernels.forward_tasks(s), [&](int64_t begin, int64_t end) { kernels.forward(s, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B,
                                           const Tensor& C, const std::optional<Tensor>& D, const std::optional<Tensor>& z,
                                           const std::optional<Tensor>& delta_bias, const std::optional<Tensor>& initial_state,
                                           int64_t scheme, int64_t step, bool delta_softplus, bool save_states) {
  SelectiveScan s = describe(u, delta, A, B, C, D, z, delta_bias, scheme, step, delta_softplus);
  Tensor out = result_like(s, u);
  Tensor last_state = empty(u, {s.batch, s.order.directions(), s.dim, s.states}, compute_type(s));
  Tensor tile_states = empty(u, save_states ? tile_states_shape(s) : Shape{0}, compute_type(s));
  s.out = grid_view(out);
  s.last_state = state_view(last_state);
  if (initial_state) s.initial_state = state_view(*initial_state);
  if (save_states) s.tile_states = tile_states.data_ptr();
  run_forward(s);
  return {finished(out, u), last_state, tile_states};
}

// One token; the state is read and written in place.
Tensor update(const Tensor& state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
              const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
              bool delta_softplus) {
  SelectiveScan s = describe(u, delta, A, B, C, D, z, delta_bias, int64_t(ScanScheme::kRow), 1, delta_softplus);
  Tensor out = empty_like(u);
  s.out = grid_view(out);
  s.initial_state = s.last_state = state_view(state);
  run_forward(s);
  return out;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_last_state, const Tensor& u, const Tensor& delta,
                   const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                   const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias, const Tensor& tile_states,
                   int64_t scheme, int64_t step, bool delta_softplus, bool has_initial_state) {
  SelectiveScan s = describe(u, delta, A, B, C, D, z, delta_bias, scheme, step, delta_softplus);
  s.tile_states = tile_states.data_ptr();
  const SelectiveScanKernels& kernels = selective_scan_kernels();
  const int64_t K = s.order.directions(), parts = kernels.backward_parts(s);
  const ScalarType compute = compute_type(s);
  const Tensor absent = empty(u, {0}, compute);
  // With disjoint directions (es2d) a tensor that has a slice per direction gets gradients only at that direction's pixels.
  const bool sparse = K > 1 && !s.order.overlaps();

  SelectiveScanGradients d{};
  d.out = grid_view(grad_out);
  if (grad_last_state) d.last_state = state_view(*grad_last_state);
  Tensor du = result_like(s, u);
  d.u = grid_view(du);
  const int64_t delta_directions = delta.size(1);
  Tensor ddelta = absent;
  if (s.delta_rows == s.dim && !(sparse && delta_directions > 1)) {
    ddelta = delta_directions == 1 ? result_like(s, delta) : empty_like(delta);
  } else {
    const Shape shape = {s.batch, delta_directions, s.dim, u.size(2), u.size(3)};
    ddelta = sparse && delta_directions > 1 ? zeros(u, shape, compute) : empty(u, shape, compute);
  }
  d.delta = direction_grid_view(ddelta);
  Tensor dz = z ? result_like(s, *z) : absent;
  if (z) d.z = grid_view(dz);
  Tensor dA = empty(u, {s.batch, K, s.dim, s.states}, compute);
  Tensor dD = D ? empty(u, {s.batch, K, s.dim}, compute) : absent;
  Tensor dbias = delta_bias ? empty(u, {s.batch, K, s.dim}, compute) : absent;
  Tensor dh0 = has_initial_state ? empty(u, {s.batch, K, s.dim, s.states}, compute) : absent;
  const auto projection_gradient = [&](const Tensor& t, int64_t* directions) {
    if (t.dim() == 3) return empty(u, {s.batch, K, s.dim, s.states}, compute);
    *directions = t.size(1);
    const Shape shape = {parts, s.batch, t.size(1), s.groups, u.size(2), u.size(3), s.states};
    return sparse && t.size(1) > 1 ? zeros(u, shape, compute) : empty(u, shape, compute);
  };
  Tensor dB = projection_gradient(B, &d.B_directions), dC = projection_gradient(C, &d.C_directions);
  d.A = dA.data_ptr();
  d.B = dB.data_ptr();
  d.C = dC.data_ptr();
  if (D) d.D = dD.data_ptr();
  if (delta_bias) d.delta_bias = dbias.data_ptr();
  if (has_initial_state) d.initial_state = state_view(dh0);

  parallel(kernels.backward_tasks(s), [&](int64_t begin, int64_t end) { kernels.backward(s, d, begin, end); });
  return {finished(du, u),
          ddelta.size(2) == s.delta_rows ? finished(ddelta, delta) : ddelta,
          sum_parts(dA),
          sum_parts(dB),
          sum_parts(dC),
          D ? sum_parts(dD) : dD,
          z ? finished(dz, *z) : dz,
          delta_bias ? sum_parts(dbias) : dbias,
          dh0};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, int scheme, int step, bool delta_softplus, bool save_states) "
      "-> (Tensor out, Tensor last_state, Tensor tile_states)");
  m.def(
      "selective_scan_backward(Tensor grad_out, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor tile_states, int scheme, int step, bool delta_softplus, "
      "bool has_initial_state) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, bool delta_softplus) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(iumad, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
  m.impl("selective_state_update", TORCH_BOX(&update));
}

}  // namespace iumad
