// Attention of queries over keys, forward and backward. Per batch b, head h, query i:
//
//   x_ij = scale q_i . k_j + mask_ij      P_ij = exp(x_ij - lse_i)      lse_i = log sum_j exp(x_ij)
//   D_ij = P_ij keep_ij / (1 - p)         out_i = sum_j D_ij v_j        weights_ij = mean over heads of D_ij
//
// keep is the dropout mask, drawn from Philox by position (philox.h; row ((b heads + h) queries + i) of keys words, each row
// starting at a multiple of 64), so backward draws it again. A row whose x are all -inf has P = 0 and lse = -inf.
// Backward recomputes P from lse:
//
//   dD_ij = dout_i . v_j + dweights_ij / heads      dP_ij = dD_ij keep_ij / (1 - p)
//   dx_ij = P_ij (dP_ij - sum_j P_ij dP_ij)         (without dweights the sum is out_i . dout_i)
//   dq_i = scale sum_j dx_ij k_j     dk_j = scale sum_i dx_ij q_i     dv_j = sum_i D_ij dout_i     dmask_ij = dx_ij
//
// A task is a chunk of queries of one key head (with `weights`, of all heads): it packs each block of keys once and takes all
// its queries over it. Sums over chunks, and over what a mask is broadcast, are left to the caller as `parts` in a fixed order,
// so that results depend on the shapes alone, never on the number of threads.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace iumad {

struct HeadView {  // (batch, head, token, feature); strides in elements
  void* data;
  DType dtype;
  int64_t batch, head, token, feature;
};

struct MaskView {  // (batch, head, query, key); a stride of 0 broadcasts. data may be null
  void* data;
  bool is_bool;  // true: the key takes part
  DType dtype;   // of an additive mask
  int64_t batch, head, query, key;
};

struct CrossAttention {
  int64_t batch, heads, key_heads, queries, keys, dim, value_dim;  // heads is a multiple of key_heads
  double scale, dropout_p;
  bool causal;  // key j takes part for queries i >= j
  bool is_double;
  uint64_t seed;
  HeadView query, key, value, out;
  MaskView mask;
  void* lse;      // (batch, heads, queries), compute type, contiguous
  void* weights;  // (batch, queries, keys), compute type, contiguous; may be null

  int64_t group() const { return key_heads > 0 ? heads / key_heads : 0; }
};

struct CrossAttentionGradients {
  HeadView out;         // gradient of the output
  const void* weights;  // gradient of the weights, as `weights`; may be null
  HeadView query;       // result
  // Results to be added over the parts (one per chunk of queries); `part` is the stride between parts.
  HeadView key, value;
  int64_t key_part, value_part;
  // Gradient of an additive mask before the sums over what it is broadcast, compute type, contiguous; may be null:
  // (batch, heads, queries or, where the mask has one row for all queries, parts, keys or 1)
  void* mask;
  bool mask_has_queries, mask_has_keys;
};

struct CrossAttentionKernels {
  // The work is a number of independent tasks; any split of [0, tasks) over any threads gives the same bits.
  int64_t (*forward_tasks)(const CrossAttention&);
  void (*forward)(const CrossAttention&, int64_t begin, int64_t end);
  int64_t (*backward_parts)(const CrossAttention&, bool weights);
  int64_t (*backward_tasks)(const CrossAttention&, bool weights);
  void (*backward)(const CrossAttention&, const CrossAttentionGradients&, int64_t begin, int64_t end);
};

IUMAD_DECLARE_KERNELS(CrossAttentionKernels, cross_attention)
IUMAD_DECLARE_BF16_KERNELS(CrossAttentionKernels, cross_attention, amx)

}  // namespace iumad
