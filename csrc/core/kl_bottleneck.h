// Divergence of two categorical distributions given by logits, and the cross-entropy of each, row by row:
//
//   p = softmax(P / T), q = softmax(Q / T)     r_j = log p_j - log q_j
//   KL[p || q] = sum_j p_j r_j
//   JS_b[p, q] = b KL[p || m] + (1 - b) KL[q || m],   m = b p + (1 - b) q     (0 < b < 1; GKD, arXiv 2306.13649, equation 1)
//   CE_p = -log softmax(P)_label, CE_q likewise: always at T = 1
//
// Forward takes two passes over a row that stays in the cache (maxima, then sums) and keeps a RowStats of it; backward recomputes
// the probabilities from the logits and that, unless it runs along with forward, whose exponentials are then still in scratch:
//
//   KL:  dP_j = p_j (r_j - KL) / T                      dQ_j = (q_j - p_j) / T
//   JS:  dP_j = b p_j (log(p_j / m_j) - KL[p||m]) / T   dQ_j = (1 - b) q_j (log(q_j / m_j) - KL[q||m]) / T
//   CE:  dP_j = softmax(P)_j - [j = label]
//
// Logits of -inf are classes of probability 0, with 0 log 0 = 0; a row of nothing else has no mass (p = 0). KL is +inf where q
// has no mass at a class where p has some; such a row gives P no gradient of its KL, and Q the formula above. NaN and +inf give
// NaN.
#pragma once

#include "dispatch.h"
#include "row_view.h"

namespace iumad {

struct KLBottleneck {
  int64_t rows, classes;
  bool is_double;
  RowsView p, q;
  RowsView mask;          // bool, true takes part: a class left out is as one of logit -inf on both sides; data may be null
  const int64_t* labels;  // may be null
  int64_t label_stride;
  double temperature;
  double beta;  // 0: KL[p || q]; in between: Jensen-Shannon
  // (rows, kKLStats) in the compute type (float, or double for double tensors), contiguous: see RowStats. May be null in forward.
  void* stats;
};

constexpr int kKLStats = 9;
template <class F>
struct RowStats {
  F p_max, p_scale, q_max, q_scale;  // p_j = exp((P_j - p_max) / T) * p_scale; the scale of a row without mass is 0
  F p_divergence, q_divergence;      // KL[p || q] and unused, or KL[p || m] and KL[q || m]
  F p_scale_ce, q_scale_ce;          // the scales at T = 1
  F taken;                           // classes that take part; 0 drops the row from every mean
};

struct KLRowLosses {  // of one row; cross-entropies are 0 without labels, everything is 0 for a row that takes no part
  double divergence, p_cross_entropy, q_cross_entropy, taken;
};

struct KLGradients {
  RowsView p, q;  // results; data may be null
  // The gradient of row i's divergence is divergence[i * divergence_stride] * divergence_scale (compute type); to P only where
  // `through_p`. Those of the cross-entropies are the same for all rows.
  const void* divergence;
  int64_t divergence_stride;
  double divergence_scale, p_cross_entropy, q_cross_entropy;
  bool through_p;
};

struct KLBottleneckKernels {
  // Rows are independent: any split of [0, rows) over any threads gives the same bits.
  // Forward with gradients (may be null) writes those too while the row is in the cache: half the memory traffic of doing it
  // later.
  void (*forward)(const KLBottleneck&, KLRowLosses*, const KLGradients*, int64_t begin, int64_t end);
  void (*backward)(const KLBottleneck&, const KLGradients&, int64_t begin, int64_t end);
};

IUMAD_DECLARE_KERNELS(KLBottleneckKernels, kl_bottleneck)

}  // namespace iumad
