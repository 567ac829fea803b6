// torch.ops.iumad.anomaly_map. Arguments arrive checked by iumad_kernels/ops/anomaly_map.py, which documents their shapes.
#include "../core/anomaly_map.h"

#include <tuple>

#include "../core/resampling.h"
#include "common.h"

namespace iumad {
namespace {

FeatureView feature_view(const Tensor& t) {
  return {t.data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

SparseRows rows_of(const Resampling& r) { return {r.first.data(), r.index.data(), r.weight.data()}; }

AnomalyMap describe(const Tensor& features, const Tensor& reference, int64_t height, int64_t width, int64_t pool,
                    const Resampling& Y, const Resampling& X) {
  AnomalyMap s{};
  s.batch = features.size(0);
  s.channels = features.size(1);
  s.rows = features.size(2);
  s.columns = features.size(3);
  s.height = height;
  s.width = width;
  s.pool = pool;
  s.is_double = features.scalar_type() == ScalarType::Double;
  s.features = feature_view(features);
  s.reference = feature_view(reference);
  s.Y = rows_of(Y);
  s.X = rows_of(X);
  return s;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& features, const Tensor& reference, int64_t height, int64_t width,
                                                   int64_t pool, double sigma) {
  const Resampling Y = bilinear_gaussian(features.size(2), height, sigma);
  const Resampling X = bilinear_gaussian(features.size(3), width, sigma);
  AnomalyMap s = describe(features, reference, height, width, pool, Y, X);
  const ScalarType compute = s.is_double ? ScalarType::Double : ScalarType::Float;
  Tensor map = empty(features, {s.batch, height, width}, compute), score = empty(features, {s.batch}, compute);
  Tensor distance = empty(features, {s.batch, s.rows, s.columns}, compute), peak = empty(features, {s.batch}, ScalarType::Long);
  s.distance = distance.data_ptr();
  s.map = map.data_ptr();
  s.score = score.data_ptr();
  s.peak = static_cast<int64_t*>(peak.data_ptr());
  const AnomalyMapKernels& kernels = anomaly_map_kernels();
  parallel(kernels.feature_tasks(s), [&](int64_t begin, int64_t end) { kernels.distances(s, begin, end); });
  parallel(s.batch, [&](int64_t begin, int64_t end) { kernels.maps(s, begin, end); });
  return {map, score, distance, peak};
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_map, const std::optional<Tensor>& grad_score,
                                    const Tensor& features, const Tensor& reference, const Tensor& distance, const Tensor& peak,
                                    int64_t height, int64_t width, int64_t pool, double sigma, bool needs_features,
                                    bool needs_reference) {
  const Resampling Y = bilinear_gaussian(features.size(2), height, sigma);
  const Resampling X = bilinear_gaussian(features.size(3), width, sigma), Xt = transposed(X, features.size(3));
  AnomalyMap s = describe(features, reference, height, width, pool, Y, X);
  s.X_transposed = rows_of(Xt);
  s.distance = distance.data_ptr();
  s.peak = static_cast<int64_t*>(peak.data_ptr());
  AnomalyMapGradients d{};
  Tensor workspace = empty(distance, {s.batch, s.rows, s.columns}, distance.scalar_type());
  const auto gradient = [&](const Tensor& t, bool needed) {
    return needed ? empty_grid(t, s.rows, s.columns) : empty(t, {0, 0, 0, 0}, t.scalar_type());
  };
  Tensor dfeatures = gradient(features, needs_features), dreference = gradient(reference, needs_reference);
  std::optional<Tensor> map, score;
  if (grad_map) map = torch::stable::contiguous(*grad_map);
  if (grad_score) score = torch::stable::contiguous(*grad_score);
  d.map = data(map);
  d.score = data(score);
  d.distance = workspace.data_ptr();
  if (needs_features) d.features = feature_view(dfeatures);
  if (needs_reference) d.reference = feature_view(dreference);
  const AnomalyMapKernels& kernels = anomaly_map_kernels();
  parallel(s.batch, [&](int64_t begin, int64_t end) { kernels.distance_gradients(s, d, begin, end); });
  parallel(kernels.feature_tasks(s), [&](int64_t begin, int64_t end) { kernels.feature_gradients(s, d, begin, end); });
  return {dfeatures, dreference};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "anomaly_map(Tensor features, Tensor reference, int height, int width, int pool, float sigma) "
      "-> (Tensor map, Tensor score, Tensor distance, Tensor peak)");
  m.def(
      "anomaly_map_backward(Tensor? grad_map, Tensor? grad_score, Tensor features, Tensor reference, Tensor distance, Tensor "
      "peak, "
      "int height, int width, int pool, float sigma, bool needs_features, bool needs_reference) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iumad, CPU, m) {
  m.impl("anomaly_map", TORCH_BOX(&forward));
  m.impl("anomaly_map_backward", TORCH_BOX(&backward));
}

}  // namespace iumad
