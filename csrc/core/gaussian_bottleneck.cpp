#include "gaussian_bottleneck.h"

#include "normal.h"
#include "row_io.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {
namespace {

// Float sums are added up in double once per so many columns.
constexpr int64_t kColumnsPerSum = 1024;

// Calls body(index, lanes, eps) along row `row`.
template <class F, class Body>
inline void along_row(const GaussianBottleneck& g, int64_t row, const Body& body) {
  const int64_t blocks = (g.columns + kNormalBlock - 1) / kNormalBlock;
  F eps[kNormalBlock];
  for (int64_t b = 0; b < blocks; ++b) {
    normal_block<F>(g.seed, uint64_t(row * blocks + b), eps);
    const int64_t first = b * kNormalBlock, left = g.columns - first, count = left < kNormalBlock ? left : kNormalBlock;
    for (int64_t i = 0; i < count; i += kLanes<F>) {
      const int64_t lanes = count - i;
      body(first + i, lanes < kLanes<F> ? lanes : int64_t(kLanes<F>), load(eps + i));
    }
  }
}

template <class F>
inline Vec<F> get(const F* p, int64_t lanes, F pad) {
  return lanes == kLanes<F> ? load(p) : load_part(p, lanes, pad);
}
template <class F>
inline void put(F* p, Vec<F> v, int64_t lanes) {
  lanes == kLanes<F> ? store<F>(p, v) : store_part<F>(p, v, lanes);
}

template <class F>
struct Buffers {
  Scratch memory;
  F *mu, *logvar, *in, *out, *out2;

  explicit Buffers(int64_t n) : memory(5 * Scratch::bytes<F>(n)) {
    for (F** p : {&mu, &logvar, &in, &out, &out2}) *p = memory.take<F>(n);
  }
};

template <class F>
void forward(const GaussianBottleneck& g, const RowsView& sample, void* kl, int64_t begin, int64_t end) {
  using V = Vec<F>;
  Buffers<F> m(g.columns);
  const F scale = F(1 / (g.prior_std * g.prior_std)), log_prior = F(2 * __builtin_log(g.prior_std)), mean = F(g.prior_mean);
  for (int64_t row = begin; row < end; ++row) {
    const F* mu = read_row<F>(g.mu, row, g.columns, m.mu);
    const F* logvar = read_row<F>(g.logvar, row, g.columns, m.logvar);
    F* out = row_target<F>(sample, row, m.out);
    double total = 0;
    V sum{};
    along_row<F>(g, row, [&](int64_t i, int64_t lanes, V eps) {
      const V x = get(mu + i, lanes, F(0)), log_variance = get(logvar + i, lanes, F(0));
      const V sigma = exp<F>(log_variance * broadcast(F(0.5))), away = x - broadcast(mean);
      put(out + i, fma(sigma, eps, x), lanes);
      const V term = fma(fma(sigma, sigma, away * away), broadcast(scale), broadcast(log_prior - F(1)) - log_variance);
      sum += lanes == kLanes<F> ? term : first_lanes<F>(term, lanes);
      if ((i + kLanes<F>) % kColumnsPerSum == 0) total += double(sum_lanes<F>(sum)), sum = V{};
    });
    static_cast<F*>(kl)[row] = F(0.5 * (total + double(sum_lanes<F>(sum))));
    write_row<F>(sample, row, g.columns, out);
  }
}

template <class F>
void backward(const GaussianBottleneck& g, const GaussianGradients& d, int64_t begin, int64_t end) {
  using V = Vec<F>;
  Buffers<F> m(g.columns);
  const V scale = broadcast(F(1 / (g.prior_std * g.prior_std))), mean = broadcast(F(g.prior_mean)), half = broadcast(F(0.5));
  for (int64_t row = begin; row < end; ++row) {
    const F* mu = read_row<F>(g.mu, row, g.columns, m.mu);
    const F* logvar = read_row<F>(g.logvar, row, g.columns, m.logvar);
    const F* dsample = d.sample.data ? read_row<F>(d.sample, row, g.columns, m.in) : nullptr;
    F *dmu = row_target<F>(d.mu, row, m.out), *dlogvar = row_target<F>(d.logvar, row, m.out2);
    const V dkl = broadcast(d.kl ? static_cast<const F*>(d.kl)[row * d.kl_stride] : F(0));
    along_row<F>(g, row, [&](int64_t i, int64_t lanes, V eps) {
      const V ds = dsample ? get(dsample + i, lanes, F(0)) : V{};
      const V sigma = exp<F>(get(logvar + i, lanes, F(0)) * half), x = get(mu + i, lanes, F(0));
      put(dmu + i, fma(dkl, (x - mean) * scale, ds), lanes);
      put(dlogvar + i, half * fma(dkl, fma(sigma * sigma, scale, broadcast(F(-1))), ds * sigma * eps), lanes);
    });
    write_row<F>(d.mu, row, g.columns, dmu);
    write_row<F>(d.logvar, row, g.columns, dlogvar);
  }
}

void run_forward(const GaussianBottleneck& g, const RowsView& sample, void* kl, int64_t begin, int64_t end) {
  g.is_double ? forward<double>(g, sample, kl, begin, end) : forward<float>(g, sample, kl, begin, end);
}

void run_backward(const GaussianBottleneck& g, const GaussianGradients& d, int64_t begin, int64_t end) {
  g.is_double ? backward<double>(g, d, begin, end) : backward<float>(g, d, begin, end);
}

}  // namespace

extern const GaussianBottleneckKernels gaussian_bottleneck;
const GaussianBottleneckKernels gaussian_bottleneck = {run_forward, run_backward};

}  // namespace iumad::IUMAD_ISA
