// torch.ops.iumad.selective_scan on the GPU: allocates, and calls the kernels of csrc/cuda on torch's current stream.
#include "../cuda/selective_scan.h"
#include "common_cuda.h"
#include "selective_scan.h"

namespace iumad {
namespace {

Shape tile_states_shape(const SelectiveScan& s) { return {s.batch, s.order.directions(), s.tiles(cuda::kTile), s.states, s.dim}; }

// The kernels read B and C in the compute type.
Tensor projection(const Tensor& t, const Tensor& u) {
  const ScalarType compute = u.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return t.scalar_type() == compute ? t : torch::stable::to(t, compute);
}

ForwardResults forward(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                       const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
                       const std::optional<Tensor>& initial_state, int64_t scheme, int64_t step, bool delta_softplus,
                       bool save_states, bool want_last_state) {
  const CudaContext cuda(u);
  const Tensor B_read = projection(B, u), C_read = projection(C, u);
  SelectiveScan s = describe(u, delta, A, B_read, C_read, D, z, delta_bias, scheme, step, delta_softplus);
  Tensor out = result_like(s, u);
  Tensor last_state =
      empty(u, state_shape(s, is_sequence(u)), compute_type(s));  // between two tiles the kernel keeps its states there
  Tensor tile_states = empty(u, save_states ? tile_states_shape(s) : Shape{0}, compute_type(s));
  s.out = token_view(out);
  s.last_state = state_view(last_state);
  if (initial_state) s.initial_state = state_view(*initial_state);
  if (save_states) s.tile_states = tile_states.data_ptr();
  check(cuda::selective_scan(s, cuda::selective_scan_lanes(s, cuda.multiprocessors), cuda.stream));
  return {finished(out, u), want_last_state ? last_state : empty(u, {0}, compute_type(s)), tile_states};
}

// One token; the state is read and written in place.
Tensor update(const Tensor& state, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
              const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias,
              bool delta_softplus) {
  const CudaContext cuda(u);
  SelectiveScan s = describe(u, delta, A, B, C, D, z, delta_bias, int64_t(ScanScheme::kRow), 1, delta_softplus);
  Tensor out = new_like(u);
  s.out = token_view(out);
  s.last_state = state_view(state);
  check(cuda::selective_state_update(s, cuda.stream));
  return out;
}

Gradients backward(const Tensor& grad_out, const std::optional<Tensor>& grad_last_state, const Tensor& u, const Tensor& delta,
                   const Tensor& A, const Tensor& B, const Tensor& C, const std::optional<Tensor>& D,
                   const std::optional<Tensor>& z, const std::optional<Tensor>& delta_bias, const Tensor& tile_states,
                   int64_t scheme, int64_t step, bool delta_softplus, bool has_initial_state) {
  const CudaContext cuda(u);
  const Tensor B_read = projection(B, u), C_read = projection(C, u);
  SelectiveScan s = describe(u, delta, A, B_read, C_read, D, z, delta_bias, scheme, step, delta_softplus);
  s.tile_states = saved_states(tile_states);
  const bool sequence = is_sequence(u);
  const int lanes = cuda::selective_scan_lanes(s, cuda.multiprocessors);
  const int64_t K = s.order.directions(), parts = cuda::selective_scan_parts(s, lanes);
  const ScalarType compute = compute_type(s);

  SelectiveScanGradients d{};
  const Results r = allocate_results(s, d, grad_out, grad_last_state, u, delta, D, z, delta_bias);
  Tensor dh0 = empty(u, state_shape(s, sequence), compute);
  d.initial_state = state_view(dh0);
  const auto partial = [&](const Tensor& t) {
    if (is_constant(t, sequence)) return empty(u, state_shape(s, sequence), compute);
    return empty(u, {parts, s.batch, K, s.groups, s.order.max_length(), s.states}, compute);
  };
  const Tensor dB = partial(B), dC = partial(C);
  d.B = dB.data_ptr();
  d.C = dC.data_ptr();
  check(cuda::selective_scan_backward(s, d, lanes, cuda.stream));

  const auto sum = [&](const Tensor& t) { return sum_parts(t, cuda.stream); };
  const auto summed = [&](const Tensor& t, const Tensor& sums) {
    if (is_constant(t, sequence)) return sum(sums);
    Tensor out = empty(u, projection_gradient_shape(s, t, sequence), compute);
    check(cuda::sum_projection(s, sums.data_ptr(), parts, sequence ? 1 : t.size(1), out.data_ptr(), cuda.stream));
    return states_first(out, t, sequence);
  };
  return finished_results(s, r, u, delta, z, summed(B, dB), summed(C, dC), has_initial_state ? dh0 : empty(u, {0}, compute), sum);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(iumad, CUDA, m) {
  m.impl("selective_scan", TORCH_BOX(&forward));
  m.impl("selective_scan_backward", TORCH_BOX(&backward));
  m.impl("selective_state_update", TORCH_BOX(&update));
}

}  // namespace iumad
