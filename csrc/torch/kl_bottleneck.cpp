// torch.ops.iumad.kl_divergence and kl_bottleneck, the backward they share, and both at once for eager mode. Arguments arrive
// checked by iumad_kernels/ops/kl_bottleneck.py, which documents them; only the labels are checked here, where reading them is
// cheap.
#include "../core/kl_bottleneck.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>

#include "common.h"
#include "row_view.h"

namespace iumad {
namespace {

enum Reduction : int64_t { kNone, kSum, kMean, kBatchMean };  // as numbered in iumad_kernels/ops/kl_bottleneck.py

constexpr int64_t kElementsPerTask = 16384;

KLBottleneck describe(const Tensor& p, const Tensor& q, const std::optional<Tensor>& labels, const std::optional<Tensor>& mask,
                      double temperature, double beta) {
  KLBottleneck k{};
  k.rows = count_rows(p);
  k.classes = p.size(-1);
  k.is_double = p.scalar_type() == ScalarType::Double;
  k.p = rows_view(p);
  k.q = rows_view(q);
  if (mask) k.mask = rows_view(*mask);
  if (labels) {
    k.labels = static_cast<const int64_t*>(labels->data_ptr());
    k.label_stride = labels->stride(0);
  }
  k.temperature = temperature;
  k.beta = beta;
  return k;
}

ScalarType compute_type(const KLBottleneck& k) { return k.is_double ? ScalarType::Double : ScalarType::Float; }

void check_labels(const KLBottleneck& k) {
  for (int64_t row = 0; row < k.rows; ++row) {
    const int64_t label = k.labels[row * k.label_stride];
    if (label >= 0 && label < k.classes) continue;
    throw std::invalid_argument("kl_bottleneck: labels[" + std::to_string(row) + "] = " + std::to_string(label) +
                                ", expected a class from 0 to " + std::to_string(k.classes - 1));
  }
  if (!k.mask.data) return;
  for (int64_t row = 0; row < k.rows; ++row) {
    const auto* mask = static_cast<const uint8_t*>(k.mask.data) + k.mask.offset(row);
    const int64_t label = k.labels[row * k.label_stride];
    if (mask[label * k.mask.inner_stride]) continue;
    for (int64_t i = 0; i < k.classes; ++i) {
      if (!mask[i * k.mask.inner_stride]) continue;
      throw std::invalid_argument("kl_bottleneck: labels[" + std::to_string(row) + "] = " + std::to_string(label) +
                                  ", a class that mask leaves out of that row");
    }
  }
}

template <class F>
void parallel_rows(const KLBottleneck& k, const F& f) {
  const int64_t classes = k.classes > 0 ? k.classes : 1;
  parallel(k.rows, f, classes < kElementsPerTask ? kElementsPerTask / classes : 1);
}

// How many rows or elements a mean divides by; nothing at all counts as 1, so that its mean is 0.
struct Counts {
  double rows = 0, elements = 0;

  void add(double taken) {
    rows += taken > 0;
    elements += taken;
  }
  double scale(int64_t reduction) const {
    const double count = reduction == kMean ? elements : reduction == kBatchMean ? rows : 1;
    return count > 0 ? 1 / count : 1;
  }
};

struct Losses {
  std::unique_ptr<KLRowLosses[]> rows;
  double divergence = 0, p_cross_entropy = 0, q_cross_entropy = 0;  // sums in the order of the rows
  Counts counts;
};

Losses run_forward(const KLBottleneck& k, const KLGradients* gradients = nullptr) {
  Losses losses;
  losses.rows = std::make_unique_for_overwrite<KLRowLosses[]>(k.rows);
  KLRowLosses* rows = losses.rows.get();
  const KLBottleneckKernels& kernels = kl_bottleneck_kernels();
  parallel_rows(k, [&](int64_t begin, int64_t end) { kernels.forward(k, rows, gradients, begin, end); });
  for (int64_t row = 0; row < k.rows; ++row) {
    losses.divergence += rows[row].divergence;
    losses.p_cross_entropy += rows[row].p_cross_entropy;
    losses.q_cross_entropy += rows[row].q_cross_entropy;
    losses.counts.add(rows[row].taken);
  }
  return losses;
}

void put(const Tensor& t, int64_t i, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    static_cast<double*>(t.data_ptr())[i] = value;
  } else {
    static_cast<float*>(t.data_ptr())[i] = float(value);
  }
}

double item(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? *static_cast<const double*>(t.data_ptr())
                                               : double(*static_cast<const float*>(t.data_ptr()));
}

Tensor scalar(const Tensor& like, ScalarType dtype, double value) {
  Tensor t = empty(like, {}, dtype);
  put(t, 0, value);
  return t;
}

Tensor new_stats(KLBottleneck& k, const Tensor& like, bool save_stats) {
  Tensor stats = empty(like, save_stats ? Shape{k.rows, kKLStats} : Shape{0, kKLStats}, compute_type(k));
  k.stats = save_stats ? stats.data_ptr() : nullptr;
  return stats;
}

std::tuple<Tensor, Tensor> divergence(const Tensor& p, const Tensor& q, const std::optional<Tensor>& mask, double temperature,
                                      double beta, int64_t reduction, bool save_stats) {
  KLBottleneck k = describe(p, q, std::nullopt, mask, temperature, beta);
  Tensor stats = new_stats(k, p, save_stats);
  const Losses losses = run_forward(k);
  if (reduction != kNone) return {scalar(p, compute_type(k), losses.divergence * losses.counts.scale(reduction)), stats};
  const auto sizes = p.sizes();
  Tensor out = empty(p, Shape(sizes.begin(), sizes.end() - 1), compute_type(k));
  for (int64_t row = 0; row < k.rows; ++row) put(out, row, losses.rows[row].divergence);
  return {out, stats};
}

using BottleneckLosses = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

BottleneckLosses total_and_parts(const KLBottleneck& k, const Losses& losses, const Tensor& like, const Tensor& stats,
                                 double kl_weight, double ce_weight) {
  const double scale = losses.counts.scale(kBatchMean);
  const double kl = losses.divergence * scale, p_ce = losses.p_cross_entropy * scale, q_ce = losses.q_cross_entropy * scale;
  // A weight of 0 switches a term off, also one that is infinite.
  const double total = (kl_weight == 0 ? 0 : kl_weight * kl) + (ce_weight == 0 ? 0 : ce_weight * (p_ce + q_ce));
  const ScalarType dtype = compute_type(k);
  return {scalar(like, dtype, total), scalar(like, dtype, kl), scalar(like, dtype, p_ce), scalar(like, dtype, q_ce), stats};
}

BottleneckLosses bottleneck(const Tensor& p, const Tensor& q, const std::optional<Tensor>& labels,
                            const std::optional<Tensor>& mask, double temperature, double kl_weight, double ce_weight,
                            bool /*detach_p: for backward*/, bool save_stats) {
  KLBottleneck k = describe(p, q, labels, mask, temperature, 0);
  if (labels) check_labels(k);
  Tensor stats = new_stats(k, p, save_stats);
  return total_and_parts(k, run_forward(k), p, stats, kl_weight, ce_weight);
}

// Value and the gradients of the (total) loss in one go; without a mask, so that the means' denominators are known beforehand.
class AtOnce {
 public:
  AtOnce(const KLBottleneck& k, const Tensor& p, const Tensor& q, int64_t reduction, bool need_p, bool need_q)
      : dp(need_p ? new_like(p) : empty(p, {0}, p.scalar_type())), dq(need_q ? new_like(q) : empty(p, {0}, p.scalar_type())) {
    scale_ = Counts{double(k.rows), double(k.rows) * double(k.classes)}.scale(reduction);
    if (need_p) gradients.p = rows_view(dp);
    if (need_q) gradients.q = rows_view(dq);
    gradients.divergence = k.is_double ? static_cast<const void*>(&one_double_) : &one_float_;
    weigh(1, 0, true);
  }
  void weigh(double kl_weight, double ce_weight, bool through_p) {
    gradients.divergence_scale = scale_ * kl_weight;
    gradients.p_cross_entropy = gradients.q_cross_entropy = scale_ * ce_weight;
    gradients.through_p = through_p;
  }

  KLGradients gradients{};
  Tensor dp, dq;

 private:
  double scale_, one_double_ = 1;
  float one_float_ = 1;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> divergence_at_once(const Tensor& p, const Tensor& q, double temperature, double beta,
                                                              int64_t reduction, bool need_p, bool need_q) {
  KLBottleneck k = describe(p, q, std::nullopt, std::nullopt, temperature, beta);
  Tensor stats = new_stats(k, p, true);
  const AtOnce at_once(k, p, q, reduction, need_p, need_q);
  const Losses losses = run_forward(k, &at_once.gradients);
  return {scalar(p, compute_type(k), losses.divergence * losses.counts.scale(reduction)), stats, at_once.dp, at_once.dq};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_at_once(const Tensor& p, const Tensor& q,
                                                                                      const std::optional<Tensor>& labels,
                                                                                      double temperature, double kl_weight,
                                                                                      double ce_weight, bool detach_p,
                                                                                      bool need_p, bool need_q) {
  KLBottleneck k = describe(p, q, labels, std::nullopt, temperature, 0);
  if (labels) check_labels(k);
  Tensor stats = new_stats(k, p, true);
  AtOnce at_once(k, p, q, kBatchMean, need_p, need_q);
  at_once.weigh(kl_weight, ce_weight, !detach_p);
  const Losses losses = run_forward(k, &at_once.gradients);
  return std::tuple_cat(total_and_parts(k, losses, p, stats, kl_weight, ce_weight), std::make_tuple(at_once.dp, at_once.dq));
}

std::tuple<Tensor, Tensor> backward(const std::optional<Tensor>& grad_total, const std::optional<Tensor>& grad_divergence,
                                    const std::optional<Tensor>& grad_p_ce, const std::optional<Tensor>& grad_q_ce,
                                    const Tensor& p, const Tensor& q, const std::optional<Tensor>& labels,
                                    const std::optional<Tensor>& mask, const Tensor& stats, double temperature, double beta,
                                    int64_t reduction, double kl_weight, double ce_weight, bool through_p, bool need_p,
                                    bool need_q) {
  KLBottleneck k = describe(p, q, labels, mask, temperature, beta);
  STD_TORCH_CHECK(stats.size(0) == k.rows, "kl_bottleneck_backward: the forward pass has to be called with save_stats=True");
  k.stats = stats.data_ptr();
  KLGradients d{};
  d.through_p = through_p;

  Counts counts;
  if (!mask) {
    counts = {double(k.rows), double(k.rows) * double(k.classes)};
  } else {
    for (int64_t row = 0; row < k.rows; ++row) {
      counts.add(k.is_double ? static_cast<const RowStats<double>*>(k.stats)[row].taken
                             : double(static_cast<const RowStats<float>*>(k.stats)[row].taken));
    }
  }
  const double scale = counts.scale(reduction);
  const double total = grad_total ? item(*grad_total) : 0;
  const auto of_part = [&](const std::optional<Tensor>& g, double weight) {
    return scale * ((weight == 0 ? 0 : weight * total) + (g ? item(*g) : 0));
  };
  d.p_cross_entropy = of_part(grad_p_ce, ce_weight);
  d.q_cross_entropy = of_part(grad_q_ce, ce_weight);
  const double one_double = 1;
  const float one_float = 1;
  const bool by_row = reduction == kNone && grad_divergence;
  const Tensor row_gradients = by_row ? torch::stable::reshape(*grad_divergence, {-1}) : stats;
  if (by_row) {
    d.divergence = row_gradients.data_ptr();
    d.divergence_stride = row_gradients.stride(0);
    d.divergence_scale = 1;
  } else {
    d.divergence = k.is_double ? static_cast<const void*>(&one_double) : &one_float;
    d.divergence_scale = reduction == kNone ? 0 : of_part(grad_divergence, kl_weight);
  }

  const Tensor absent = empty(p, {0}, p.scalar_type());
  Tensor dp = need_p ? new_like(p) : absent, dq = need_q ? new_like(q) : absent;
  if (need_p) d.p = rows_view(dp);
  if (need_q) d.q = rows_view(dq);
  const KLBottleneckKernels& kernels = kl_bottleneck_kernels();
  if (need_p || need_q) parallel_rows(k, [&](int64_t begin, int64_t end) { kernels.backward(k, d, begin, end); });
  return {dp, dq};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(iumad, m) {
  m.def(
      "kl_divergence(Tensor p, Tensor q, Tensor? mask, float temperature, float beta, int reduction, bool save_stats) "
      "-> (Tensor loss, Tensor stats)");
  m.def(
      "kl_bottleneck(Tensor p, Tensor q, Tensor? labels, Tensor? mask, float temperature, float kl_weight, float ce_weight, "
      "bool detach_p, bool save_stats) -> (Tensor total, Tensor kl, Tensor p_ce, Tensor q_ce, Tensor stats)");
  m.def(
      "kl_divergence_at_once(Tensor p, Tensor q, float temperature, float beta, int reduction, bool need_p, bool need_q) "
      "-> (Tensor loss, Tensor stats, Tensor dp, Tensor dq)");
  m.def(
      "kl_bottleneck_at_once(Tensor p, Tensor q, Tensor? labels, float temperature, float kl_weight, float ce_weight, "
      "bool detach_p, bool need_p, bool need_q) "
      "-> (Tensor total, Tensor kl, Tensor p_ce, Tensor q_ce, Tensor stats, Tensor dp, Tensor dq)");
  m.def(
      "kl_bottleneck_backward(Tensor? grad_total, Tensor? grad_divergence, Tensor? grad_p_ce, Tensor? grad_q_ce, Tensor p, "
      "Tensor q, Tensor? labels, Tensor? mask, Tensor stats, float temperature, float beta, int reduction, float kl_weight, "
      "float ce_weight, bool through_p, bool need_p, bool need_q) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(iumad, CPU, m) {
  m.impl("kl_divergence", TORCH_BOX(&divergence));
  m.impl("kl_bottleneck", TORCH_BOX(&bottleneck));
  m.impl("kl_divergence_at_once", TORCH_BOX(&divergence_at_once));
  m.impl("kl_bottleneck_at_once", TORCH_BOX(&bottleneck_at_once));
  m.impl("kl_bottleneck_backward", TORCH_BOX(&backward));
}

}  // namespace iumad
