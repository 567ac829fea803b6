#include "resampling.h"

#include <cmath>

namespace iumad {
namespace {

struct Taps {  // of one output sample
  int64_t low, high;
  double low_weight, high_weight;
};

Taps bilinear(int64_t in, int64_t out, int64_t i) {
  const double position = out > 1 ? double(i) * double(in - 1) / double(out - 1) : 0.0;
  const int64_t low = int64_t(position);
  const double fraction = position - double(low);
  return {low, low + (low + 1 < in), 1 - fraction, fraction};
}

// The sample that stands at position i of a row mirrored without end: c b a | a b c | c b a.
int64_t mirrored(int64_t i, int64_t n) {
  const int64_t period = 2 * n, m = ((i % period) + period) % period;
  return m < n ? m : period - 1 - m;
}

std::vector<double> gaussian(double sigma) {
  const int64_t radius = int64_t(4 * sigma + 0.5);
  std::vector<double> weight(2 * radius + 1);
  double total = 0;
  for (int64_t i = -radius; i <= radius; ++i) total += weight[i + radius] = std::exp(-0.5 * double(i * i) / (sigma * sigma));
  for (double& w : weight) w /= total;
  return weight;
}

}  // namespace

Resampling bilinear_gaussian(int64_t in, int64_t out, double sigma) {
  Resampling result;
  result.first.push_back(0);
  const std::vector<double> kernel = sigma > 0 ? gaussian(sigma) : std::vector<double>{};
  const int64_t radius = int64_t(kernel.size()) / 2;
  std::vector<double> row(in);
  for (int64_t i = 0; i < out; ++i) {
    if (kernel.empty()) {  // both taps stay, a weight of 0 too: 0 * inf is NaN, as in torch
      const Taps t = bilinear(in, out, i);
      result.index.insert(result.index.end(), {int32_t(t.low), int32_t(t.high)});
      result.weight.insert(result.weight.end(), {t.low_weight, t.high_weight});
    } else {
      row.assign(in, 0.0);
      for (int64_t k = -radius; k <= radius; ++k) {
        const Taps t = bilinear(in, out, mirrored(i + k, out));
        row[t.low] += kernel[k + radius] * t.low_weight;
        row[t.high] += kernel[k + radius] * t.high_weight;
      }
      for (int64_t j = 0; j < in; ++j) {
        if (row[j] == 0) continue;
        result.index.push_back(int32_t(j));
        result.weight.push_back(row[j]);
      }
    }
    result.first.push_back(int64_t(result.index.size()));
  }
  return result;
}

Resampling transposed(const Resampling& m, int64_t columns) {
  const int64_t rows = int64_t(m.first.size()) - 1;
  Resampling result;
  result.first.assign(columns + 1, 0);
  result.index.resize(m.index.size());
  result.weight.resize(m.weight.size());
  for (int32_t j : m.index) ++result.first[j + 1];
  for (int64_t j = 0; j < columns; ++j) result.first[j + 1] += result.first[j];
  std::vector<int64_t> next(result.first.begin(), result.first.end() - 1);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = m.first[i]; k < m.first[i + 1]; ++k) {
      const int64_t slot = next[m.index[k]]++;
      result.index[slot] = int32_t(i);
      result.weight[slot] = m.weight[k];
    }
  }
  return result;
}

}  // namespace iumad
