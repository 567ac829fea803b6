#include "kl_bottleneck.h"

#include "math.h"
#include "row_io.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {
namespace {

// Float sums are added up in double once per so many vectors.
constexpr int64_t kVectorsPerSum = 64;

template <class F>
inline Vec<F> zero_where_dead(Vec<F> logit, Vec<F> value) {
  return logit == broadcast(-kInf<F>) ? Vec<F>{} : value;
}

// Calls body(vector of p, vector of q, index, lanes) along two rows; lanes past the end are -inf.
template <class F, class Body>
inline void along(const F* p, const F* q, int64_t begin, int64_t end, const Body& body) {
  constexpr int V = kLanes<F>;
  int64_t i = begin;
  for (; i + V <= end; i += V) body(load(p + i), load(q + i), i, int64_t(V));
  if (i < end) body(load_part(p + i, end - i, -kInf<F>), load_part(q + i, end - i, -kInf<F>), i, end - i);
}

// Adds up body's vectors over two rows, each vector component by component: floats inside a block of vectors, doubles between
// blocks.
template <int kSums, class F, class Body>
inline void sum_along(const F* p, const F* q, int64_t n, double (&total)[kSums], const Body& body) {
  constexpr int64_t kBlock = kVectorsPerSum * kLanes<F>;
  for (double& t : total) t = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    Vec<F> sum[kSums] = {};
    const int64_t left = n - first;
    along<F>(p, q, first, first + (left < kBlock ? left : kBlock),
             [&](Vec<F> x, Vec<F> y, int64_t i, int64_t) { body(x, y, i, sum); });
    IUMAD_UNROLL for (int k = 0; k < kSums; ++k) total[k] += double(sum_lanes<F>(sum[k]));
  }
}

inline double inverse(double sum) { return sum == 0 ? 0 : 1 / sum; }  // a row without mass stays without
inline double log_or_zero(double sum) { return sum == 0 ? 0 : __builtin_log(sum); }

// Memory a row's neighbours will be read from and its gradients written to: the lines at the column in hand are asked for, since
// rows of a few KiB end before the hardware has seen where they lead.
template <class F>
struct Ahead {
  static constexpr int64_t kMostBytes = 8192;
  const F *p, *q, *dp, *dq;

  __attribute__((always_inline)) void operator()(int64_t i) const {
    __builtin_prefetch(p + i);
    __builtin_prefetch(q + i);
    __builtin_prefetch(dp + i, 1);
    __builtin_prefetch(dq + i, 1);
  }
};

// One pair of rows, as both directions need it.
template <class F>
struct RowPair {
  const F *p, *q;
  int64_t n;
  int64_t label;                         // -1: none
  F *exp_p = nullptr, *exp_q = nullptr;  // exp((P_j - p_max) / T) in scratch: filled by forward, null where it has not been

  bool q_misses_mass() const {
    for (int64_t i = 0; i < n; ++i)
      if (q[i] == -kInf<F> && !(p[i] == -kInf<F>)) return true;
    return false;
  }
};

template <class F>
struct RowReader {
  const KLBottleneck& k;
  Scratch memory;
  F *p, *q, *dp, *dq, *exp_p, *exp_q;

  explicit RowReader(const KLBottleneck& k) : k(k), memory(6 * Scratch::bytes<F>(k.classes)) {
    for (F** buffer : {&p, &q, &dp, &dq, &exp_p, &exp_q}) *buffer = memory.take<F>(k.classes);
  }

  int64_t taken = 0;

  RowPair<F> read(int64_t row) {
    const bool masked = k.mask.data != nullptr;
    RowPair<F> r{read_row<F>(k.p, row, k.classes, p, !masked), read_row<F>(k.q, row, k.classes, q, !masked), k.classes, -1};
    if (k.labels) r.label = k.labels[row * k.label_stride];
    taken = k.classes;
    if (masked) {
      const auto* mask = static_cast<const uint8_t*>(k.mask.data) + k.mask.offset(row);
      for (int64_t i = 0; i < k.classes; ++i) {
        if (mask[i * k.mask.inner_stride]) continue;
        p[i] = q[i] = -kInf<F>;
        --taken;
      }
    }
    return r;
  }
};

// log m - log p and log m - log q of the mixture m, finite wherever p or q is; both need their logs of probability.
template <class F>
struct Mixture {
  Vec<F> log_beta, log_rest;

  explicit Mixture(double beta) : log_beta(broadcast(F(__builtin_log(beta)))), log_rest(broadcast(F(__builtin_log1p(-beta)))) {}

  Vec<F> log_m(Vec<F> log_p, Vec<F> log_q) const {
    const Vec<F> a = log_p + log_beta, b = log_q + log_rest;
    const Vec<F> high = larger<F>(a, b), gap = a > b ? b - a : a - b;
    return high + log1p_unit(exp2_product<F, Range::kFinite>(gap, broadcast(kLog2E<F>)));
  }
};

template <class F>
double sum_exp(const F* row, F max, int64_t n) {
  double sum[1];
  sum_along<1, F>(row, row, n, sum, [&](Vec<F> x, Vec<F>, int64_t, Vec<F>(&s)[1]) {
    s[0] += exp2_product<F, Range::kFinite>(x - broadcast(max), broadcast(kLog2E<F>));
  });
  return sum[0];
}

template <class F>
KLRowLosses forward_row(const KLBottleneck& k, const RowPair<F>& r, const Ahead<F>& ahead, RowStats<F>& stats) {
  using V = Vec<F>;
  V p_max = broadcast(-kInf<F>), q_max = p_max;
  along<F>(r.p, r.q, 0, r.n, [&](V x, V y, int64_t, int64_t) {
    p_max = larger<F>(x, p_max);
    q_max = larger<F>(y, q_max);
  });
  const auto finite_or_zero = [](F m) { return m == -kInf<F> ? F(0) : m; };
  stats.p_max = finite_or_zero(max_lanes<F>(p_max));
  stats.q_max = finite_or_zero(max_lanes<F>(q_max));

  const V pm = broadcast(stats.p_max), qm = broadcast(stats.q_max), c = broadcast(F(kLog2E<double> / k.temperature));
  double sum[3];
  sum_along<3, F>(r.p, r.q, r.n, sum, [&](V x, V y, int64_t i, V(&s)[3]) {
    ahead(i);
    x -= pm;
    y -= qm;
    const V exp_p = exp2_product<F, Range::kFinite>(x, c), exp_q = exp2_product<F, Range::kFinite>(y, c);
    store<F>(r.exp_p + i, exp_p);
    store<F>(r.exp_q + i, exp_q);
    s[0] += exp_p;
    s[1] += exp_q;
    s[2] += zero_where_dead<F>(x, exp_p * (x - y));
  });
  const double p_mass = sum[0], q_mass = sum[1];
  stats.p_scale = F(inverse(p_mass));
  stats.q_scale = F(inverse(q_mass));

  KLRowLosses loss{};
  if (k.beta == 0) {
    // sum p (x - y) / T - (log of the one mass - log of the other); not finite where something in the rows is not.
    loss.divergence = p_mass == 0 ? 0 : sum[2] * inverse(p_mass) / k.temperature - log_or_zero(p_mass) + log_or_zero(q_mass);
    if (!(__builtin_fabs(loss.divergence) < __builtin_inf()) && p_mass == p_mass && q_mass == q_mass && r.q_misses_mass())
      loss.divergence = __builtin_inf();
    stats.p_divergence = F(loss.divergence);
    stats.q_divergence = 0;
  } else {
    const Mixture<F> mixture(k.beta);
    const V t = broadcast(F(1 / k.temperature)), one_p = broadcast(stats.p_scale), one_q = broadcast(stats.q_scale);
    const V p_log = broadcast(F(log_or_zero(p_mass))), q_log = broadcast(F(log_or_zero(q_mass)));
    double parts[2];
    sum_along<2, F>(r.p, r.q, r.n, parts, [&](V x, V y, int64_t i, V(&s)[2]) {
      x -= pm;
      y -= qm;
      const V log_p = x * t - p_log, log_q = y * t - q_log, log_m = mixture.log_m(log_p, log_q);
      s[0] += zero_where_dead<F>(x, load(r.exp_p + i) * one_p * (log_p - log_m));
      s[1] += zero_where_dead<F>(y, load(r.exp_q + i) * one_q * (log_q - log_m));
    });
    stats.p_divergence = F(parts[0]);
    stats.q_divergence = F(parts[1]);
    loss.divergence = k.beta * parts[0] + (1 - k.beta) * parts[1];
  }

  stats.p_scale_ce = stats.q_scale_ce = 0;
  if (r.label >= 0) {
    const double p_sum = k.temperature == 1 ? p_mass : sum_exp<F>(r.p, stats.p_max, r.n);
    const double q_sum = k.temperature == 1 ? q_mass : sum_exp<F>(r.q, stats.q_max, r.n);
    stats.p_scale_ce = F(inverse(p_sum));
    stats.q_scale_ce = F(inverse(q_sum));
    loss.p_cross_entropy = log_or_zero(p_sum) - (double(r.p[r.label]) - double(stats.p_max));
    loss.q_cross_entropy = log_or_zero(q_sum) - (double(r.q[r.label]) - double(stats.q_max));
  }
  return loss;
}

// dst_j (+)= factor * (softmax(row)_j - [j = label])
template <class F>
void add_cross_entropy(F* dst, const F* row, F max, F scale, double factor, const RowPair<F>& r) {
  const Vec<F> m = broadcast(max), f = broadcast(F(factor) * scale), c = broadcast(kLog2E<F>);
  along<F>(row, row, 0, r.n, [&](Vec<F> x, Vec<F>, int64_t i, int64_t lanes) {
    const Vec<F> g = f * exp2_product<F, Range::kFinite>(x - m, c);
    lanes == kLanes<F> ? store<F>(dst + i, load(dst + i) + g)
                       : store_part<F>(dst + i, load_part(dst + i, lanes, F(0)) + g, lanes);
  });
  dst[r.label] -= F(factor);
}

// Gradients of more bytes than this are gone from a core's share of the caches before anybody reads them.
constexpr int64_t kStreamedBytes = 8 << 20;

// All of them, if they are written where they belong, not by way of a buffer.
template <class F>
bool are_streamed(const KLBottleneck& k, const KLGradients& d) {
  const auto here = [](const RowsView& v) { return v.data == nullptr || is_plain<F>(v); };
  return here(d.p) && here(d.q) &&
         k.rows * k.classes * int64_t(sizeof(F)) * ((d.p.data != nullptr) + (d.q.data != nullptr)) > kStreamedBytes;
}

template <class F>
bool is_aligned(const F* row) {
  return reinterpret_cast<uintptr_t>(row) % kVectorBytes == 0;
}

template <class F, bool kNeedP, bool kNeedQ>
void backward_row(const KLBottleneck& k, const KLGradients& d, const RowPair<F>& r, const RowStats<F>& s, double gradient, F* dp,
                  F* dq) {
  using V = Vec<F>;
  const V pm = broadcast(s.p_max), qm = broadcast(s.q_max), c = broadcast(F(kLog2E<double> / k.temperature));
  const V one_p = broadcast(s.p_scale), one_q = broadcast(s.q_scale);
  const double slope = gradient / k.temperature;
  const double p_slope = d.through_p && !(s.p_divergence == kInf<F>) ? slope : 0;
  // At T = 1 the cross-entropies share the softmax of the divergence and cost nothing but these constants.
  const bool share = r.label >= 0 && k.temperature == 1;
  const double p_ce = share ? d.p_cross_entropy : 0, q_ce = share ? d.q_cross_entropy : 0;
  // The lambdas below hold copies: what they referred to would be read again after every store.
  const F *const saved_p = r.exp_p, *const saved_q = r.exp_q;
  const auto exp_p = [=](V x, int64_t i) { return saved_p ? load(saved_p + i) : exp2_product<F, Range::kFinite>(x, c); };
  const auto exp_q = [=](V y, int64_t i) { return saved_q ? load(saved_q + i) : exp2_product<F, Range::kFinite>(y, c); };
  const bool added_to = r.label >= 0 && !share;  // by the cross-entropies, in a second pass
  const bool streamed = are_streamed<F>(k, d) && !added_to && is_aligned(dp) && is_aligned(dq);
  const int64_t with_label = r.label < 0 ? -1 : r.label / kLanes<F> * kLanes<F>;  // the vector that is changed again
  const auto put = [=](int64_t i, int64_t lanes, V vp, V vq) {
    if (lanes < kLanes<F>) {
      if constexpr (kNeedP) store_part<F>(dp + i, vp, lanes);
      if constexpr (kNeedQ) store_part<F>(dq + i, vq, lanes);
    } else if (streamed && i != with_label) {
      if constexpr (kNeedP) stream<F>(dp + i, vp);
      if constexpr (kNeedQ) stream<F>(dq + i, vq);
    } else {
      if constexpr (kNeedP) store<F>(dp + i, vp);
      if constexpr (kNeedQ) store<F>(dq + i, vq);
    }
  };

  if (k.beta == 0) {
    const double log_ratio = s.q_scale > 0 && s.p_scale > 0 ? __builtin_log(double(s.q_scale) / double(s.p_scale)) : 0;
    // dP = p (a (x - y) + b),  dQ = q e - p f
    const V a = broadcast(F(p_slope / k.temperature));
    const V b = broadcast(F(p_ce - (p_slope == 0 ? 0 : p_slope * (double(s.p_divergence) + log_ratio))));
    const V e = broadcast(F((s.p_scale == 0 ? 0 : slope) + q_ce)), f = broadcast(F(s.q_scale == 0 ? 0 : slope));
    along<F>(r.p, r.q, 0, r.n, [=](V x, V y, int64_t i, int64_t lanes) {
      x -= pm;
      y -= qm;
      const V p = exp_p(x, i) * one_p;
      V vp{}, vq{};
      if constexpr (kNeedP) vp = p * fma(a, zero_where_dead<F>(x, zero_where_dead<F>(y, x - y)), b);
      if constexpr (kNeedQ) vq = fma(exp_q(y, i) * one_q, e, -p * f);
      put(i, lanes, vp, vq);
    });
  } else {
    const Mixture<F> mixture(k.beta);
    const V t = broadcast(F(1 / k.temperature));
    const V p_log = broadcast(F(s.p_scale == 0 ? 0 : -__builtin_log(double(s.p_scale))));
    const V q_log = broadcast(F(s.q_scale == 0 ? 0 : -__builtin_log(double(s.q_scale))));
    const V a = broadcast(F(k.beta * p_slope)), b = broadcast(s.p_divergence), p_add = broadcast(F(p_ce));
    const V e = broadcast(F((1 - k.beta) * slope)), f = broadcast(s.q_divergence), q_add = broadcast(F(q_ce));
    along<F>(r.p, r.q, 0, r.n, [=](V x, V y, int64_t i, int64_t lanes) {
      x -= pm;
      y -= qm;
      const V log_p = x * t - p_log, log_q = y * t - q_log, log_m = mixture.log_m(log_p, log_q);
      V vp{}, vq{};
      if constexpr (kNeedP) vp = exp_p(x, i) * one_p * fma(a, zero_where_dead<F>(x, log_p - log_m - b), p_add);
      if constexpr (kNeedQ) vq = exp_q(y, i) * one_q * fma(e, zero_where_dead<F>(y, log_q - log_m - f), q_add);
      put(i, lanes, vp, vq);
    });
  }

  if (r.label < 0) return;
  if (share) {
    if constexpr (kNeedP) dp[r.label] -= F(p_ce);
    if constexpr (kNeedQ) dq[r.label] -= F(q_ce);
  } else {
    if constexpr (kNeedP) add_cross_entropy<F>(dp, r.p, s.p_max, s.p_scale_ce, d.p_cross_entropy, r);
    if constexpr (kNeedQ) add_cross_entropy<F>(dq, r.q, s.q_max, s.q_scale_ce, d.q_cross_entropy, r);
  }
}

template <class F>
void put_gradients(const KLBottleneck& k, const KLGradients& d, RowReader<F>& reader, int64_t row, RowPair<F> r,
                   const RowStats<F>& stats) {
  const auto run =
      d.p.data ? (d.q.data ? backward_row<F, true, true> : backward_row<F, true, false>) : backward_row<F, false, true>;
  if (reader.taken == 0) r.label = -1;
  F* dp = d.p.data ? row_target<F>(d.p, row, reader.dp) : nullptr;
  F* dq = d.q.data ? row_target<F>(d.q, row, reader.dq) : nullptr;
  const double gradient = double(static_cast<const F*>(d.divergence)[row * d.divergence_stride]) * d.divergence_scale;
  run(k, d, r, stats, gradient, dp, dq);
  if (dp) write_row<F>(d.p, row, k.classes, dp);
  if (dq) write_row<F>(d.q, row, k.classes, dq);
}

// What lies ahead of row `row`, r; where nothing does, what is in the cache anyway: asking for that costs less than a branch.
template <class F>
Ahead<F> ahead_of(const KLBottleneck& k, const KLGradients* d, int64_t row, int64_t end, const RowPair<F>& r) {
  Ahead<F> ahead{r.p, r.q, r.exp_p, r.exp_q};
  if (k.classes * int64_t(sizeof(F)) > Ahead<F>::kMostBytes) return ahead;
  const auto place = [](const F*& p, const RowsView& v, int64_t at) {
    if (v.data && is_plain<F>(v)) p = static_cast<const F*>(v.data) + v.offset(at);
  };
  if (row + 1 < end) {
    place(ahead.p, k.p, row + 1);
    place(ahead.q, k.q, row + 1);
  }
  if (d && !are_streamed<F>(k, *d)) {
    place(ahead.dp, d->p, row);
    place(ahead.dq, d->q, row);
  }
  return ahead;
}

template <class F>
void forward(const KLBottleneck& k, KLRowLosses* losses, const KLGradients* d, int64_t begin, int64_t end) {
  RowReader<F> reader(k);
  for (int64_t row = begin; row < end; ++row) {
    RowStats<F> stats{};
    RowPair<F> r = reader.read(row);
    losses[row] = {};
    if (reader.taken > 0) {
      r.exp_p = reader.exp_p, r.exp_q = reader.exp_q;
      losses[row] = forward_row<F>(k, r, ahead_of<F>(k, d, row, end, r), stats);
    }
    losses[row].taken = double(reader.taken);
    stats.taken = F(reader.taken);
    if (k.stats) static_cast<RowStats<F>*>(k.stats)[row] = stats;
    if (d) put_gradients<F>(k, *d, reader, row, r, stats);
  }
  end_streaming();
}

template <class F>
void backward(const KLBottleneck& k, const KLGradients& d, int64_t begin, int64_t end) {
  RowReader<F> reader(k);
  for (int64_t row = begin; row < end; ++row) {
    const RowPair<F> r = reader.read(row);
    put_gradients<F>(k, d, reader, row, r, static_cast<const RowStats<F>*>(k.stats)[row]);
  }
  end_streaming();
}

void run_forward(const KLBottleneck& k, KLRowLosses* losses, const KLGradients* d, int64_t begin, int64_t end) {
  k.is_double ? forward<double>(k, losses, d, begin, end) : forward<float>(k, losses, d, begin, end);
}

void run_backward(const KLBottleneck& k, const KLGradients& d, int64_t begin, int64_t end) {
  k.is_double ? backward<double>(k, d, begin, end) : backward<float>(k, d, begin, end);
}

}  // namespace

extern const KLBottleneckKernels kl_bottleneck;
const KLBottleneckKernels kl_bottleneck = {run_forward, run_backward};

}  // namespace iumad::IUMAD_ISA
