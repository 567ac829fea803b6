// torch.ops.iumad.gaussian_bottleneck. Arguments arrive checked by iumad_kernels/ops/gaussian_bottleneck.py, which documents
// them.
#include "../core/gaussian_bottleneck.h"

#include <tuple>

#include "common.h"
#include "row_view.h"

namespace iumad {
namespace {

constexpr int64_t kElementsPerTask = 4096;

GaussianBottleneck describe(const Tensor& mu, const Tensor& logvar, const Tensor& seed, double prior_mean, double prior_std) {
  GaussianBottleneck g{};
  g.rows = count_rows(mu);
  g.columns = mu.size(-1);
  g.is_double = mu.scalar_type() == ScalarType::Double;
  g.seed = uint64_t(*static_cast<const int64_t*>(seed.data_ptr()));
  g.prior_mean = prior_mean;
  g.prior_std = prior_std;
  g.mu = rows_view(mu);
  g.logvar = rows_view(logvar);
  return g;
}

template <class F>
void parallel_rows(const GaussianBottleneck& g, const F& f) {
  parallel(g.rows, f, g.columns < kElementsPerTask ? kElementsPerTask / (g.columns + 1) : 1);
}

std::tuple<Tensor, Tensor> forward(const Tensor& mu, const Tensor& logvar, const Tensor& seed, double prior_mean,
                                   double prior_std) {
  const GaussianBottleneck g = describe(mu, logvar, seed, prior_mean, prior_std);
  const auto sizes = mu.sizes();
  Tensor sample = new_like(mu);
  Tensor kl = empty(mu, Shape(sizes.begin(), sizes.end() - 1), g.is_double ? ScalarType::Double : ScalarType::Float);
  const RowsView out = rows_view(sample);
  const GaussianBottleneckKernels& kernels = gaussian_bottleneck_kernels();
  parallel_rows(g, [&](int64_t begin, int64_t end) { kernels.forward(g, out, kl.data_ptr(), begin, end); });
  return {sample, kl};
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_sample, const std::optional<Tensor>& grad_kl,
                                    const Tensor& mu, const Tensor& logvar, const Tensor& seed, double prior_mean,
                                    double prior_std) {
  const GaussianBottleneck g = describe(mu, logvar, seed, prior_mean, prior_std);
  Tensor dmu = new_like(mu), dlogvar = new_like(logvar);
  GaussianGradients d{};
  if (grad_sample) d.sample = rows_view(*grad_sample);
  const Tensor by_row = grad_kl ? torch::stable::reshape(*grad_kl, {-1}) : mu;
  if (grad_kl) {
    d.kl = by_row.data_ptr();
    d.kl_stride = by_row.stride(0);
  }
  d.mu = rows_view(dmu);
  d.logvar = rows_view(dlogvar);
  const GaussianBottleneckKernels& kernels = gaussian_bottleneck_kernels();
  parallel_rows(g, [&](int64_t begin, int64_t end) { kernels.backward(g, d, begin, end); });
  return {dmu, dlogvar};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "gaussian_bottleneck(Tensor mu, Tensor logvar, Tensor seed, float prior_mean, float prior_std) "
      "-> (Tensor sample, Tensor kl)");
  m.def(
      "gaussian_bottleneck_backward(Tensor? grad_sample, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor seed, "
      "float prior_mean, float prior_std) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iumad, CPU, m) {
  m.impl("gaussian_bottleneck", TORCH_BOX(&forward));
  m.impl("gaussian_bottleneck_backward", TORCH_BOX(&backward));
}

}  // namespace iumad
