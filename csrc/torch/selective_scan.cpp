// torch.ops.iumad.selective_scan: the one op behind the 1-D scan, the 2-D scan and the single-step update; its schemas and the
// CPU implementation.
#include "selective_scan.h"

namespace iumad {
namespace {

// Zeroed where the last chunk has lanes without a channel, or es2d sub-grids differ in size, so that no value is left undefined.
Tensor new_tile_states(const SelectiveScan& s, const Tensor& u) {
  const Shape shape = {s.batch, s.order.directions(), s.chunks(), s.tiles(), s.states, kScanChunk};
  const bool uneven =
      s.order.scheme == ScanScheme::kEs2d && (s.order.rows % s.order.step != 0 || s.order.columns % s.order.step != 0);
  return s.dim % kScanChunk != 0 || uneven ? zeros(u, shape, compute_type(s)) : empty(u, shape, compute_type(s));
}

void run_forward(const SelectiveScan& s) {
  const SelectiveScanKernels& kernels = selective_scan_kernels(s.u.dtype);
  parallel(kernels.forward_tasks(s), [&](int64_t begin, int64_t end) { kernels.forward(s, begin, end); });
}

ForwardResults forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                       const std::optional<Tensor>& initial_state, int64_t scheme, int64_t step, bool delta_softplus,
                       bool save_states, bool want_last_state) {
  SelectiveScan s = describe(u, delta, A, B, C, D, z, delta_bias, scheme, step, delta_softplus);
  Tensor out = result_like(s, u);
  Tensor last_state = empty(u, want_last_state ? state_shape(s, is_sequence(u)) : Shape{0}, compute_type(s));
  Tensor tile_states = save_states ? new_tile_states(s, u) : empty(u, {0}, compute_type(s));
  s.out = token_view(out);
  if (want_last_state) s.last_state = state_view(last_state);
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
  Tensor out = new_like(u);
  s.out = token_view(out);
  s.initial_state = s.last_state = state_view(state);
  run_forward(s);
  return out;
}

Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_last_state, const Tensor& u, const Tensor& delta,
                   const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                   const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias, const Tensor& tile_states,
                   int64_t scheme, int64_t step, bool delta_softplus, bool has_initial_state) {
  SelectiveScan s = describe(u, delta, A, B, C, D, z, delta_bias, scheme, step, delta_softplus);
  s.tile_states = saved_states(tile_states);
  const SelectiveScanKernels& kernels = selective_scan_kernels(s.u.dtype);
  const bool sequence = is_sequence(u);
  const int64_t parts = kernels.backward_parts(s);
  const ScalarType compute = compute_type(s);

  SelectiveScanGradients d{};
  const Results r = allocate_results(s, d, grad_out, grad_last_state, u, delta, D, z, delta_bias);
  Tensor dh0 = empty(u, has_initial_state ? state_shape(s, sequence) : Shape{0}, compute);
  const auto projection_gradient = [&](const Tensor& t, int64_t* directions) {
    if (is_constant(t, sequence)) return empty(u, state_shape(s, sequence), compute);
    *directions = sequence ? 1 : t.size(1);
    Shape shape = projection_gradient_shape(s, t, sequence);
    shape.insert(shape.begin(), parts);
    return disjoint(s) && *directions > 1 ? zeros(u, shape, compute) : empty(u, shape, compute);
  };
  Tensor dB = projection_gradient(B, &d.B_directions), dC = projection_gradient(C, &d.C_directions);
  d.B = dB.data_ptr();
  d.C = dC.data_ptr();
  if (has_initial_state) d.initial_state = state_view(dh0);

  parallel(kernels.backward_tasks(s), [&](int64_t begin, int64_t end) { kernels.backward(s, d, begin, end); });
  const auto summed = [&](const Tensor& sums, const Tensor& t) { return states_first(sum_parts(sums), t, sequence); };
  return finished_results(s, r, u, delta, z, summed(dB, B), summed(dC, C), dh0, sum_parts);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, int scheme, int step, bool delta_softplus, bool save_states, bool want_last_state=True) "
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
