// Selective scan (Mamba S6), forward and backward, over sequences and over grids. Per direction k, channel d, state n:
//
//   dt_t = softplus(delta_t + bias)            h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t
//   y_t  = sum_n C_t h_t + D u_t               out_t = y_t * silu(z_t)
//
// The recurrence runs in float (double for double tensors) whatever the tensors hold. Forward keeps nothing but, when asked, the
// state at the start of every kScanTile tokens; backward recomputes the states inside a tile from there:
//
//   g_t  = C_t dy_t + exp(dt_{t+1} A) g_{t+1}        (gradient of the state)
//   dC_t = sum_d dy_t h_t    dB_t = sum_d g_t dt_t u_t    du_t = dt_t sum_n g_t B_t + D dy_t
//   ddt_t = sum_n g_t (exp(dt_t A) h_{t-1} A + B_t u_t)   dA = sum_t g_t exp(dt_t A) h_{t-1} dt_t
//
// Sums over channels, tokens and batch are taken in an order that depends on the shapes alone, never on the number of threads.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"
#include "scan_order.h"

namespace iumad {

constexpr int kScanTile = 16;   // tokens between two saved states on the CPU; measured, see docs/performance.md
constexpr int kScanChunk = 16;  // channels whose saved states lie together

// Strides are in elements. A stride of 0 shares the value (one delta for all directions, say).
struct TokenView {  // (batch, direction, channel, row, column)
  void* data;
  DType dtype;
  int64_t batch, direction, channel, row, column;
};
struct StateView {  // (batch, direction, channel, state)
  void* data;
  DType dtype;
  int64_t batch, direction, channel, state;
};
// B or C. Varying: (batch, direction, group, row, column, state) with state stride 1; on a GPU in the compute type.
// Constant: (direction, channel, state), contiguous, in the compute type.
struct ProjectionView {
  const void* data;
  DType dtype;
  bool constant;
  int64_t batch, direction, group, row, column;
};

struct SelectiveScan {
  int64_t batch, dim, states, groups, delta_rows;  // delta_rows divides dim: channel d reads row d * delta_rows / dim
  ScanOrder order;
  bool delta_softplus, is_double;
  TokenView u, delta, z, out;  // z.data may be null
  const void *A, *D,
      *delta_bias;  // (directions, dim, states) and twice (directions, dim), contiguous, compute type; D, bias may be null
  ProjectionView B, C;
  StateView initial_state, last_state;  // data may be null (on a GPU the last state's may not)
  void* tile_states;  // (batch, directions, chunks, tiles, states, kScanChunk) compute type, contiguous; may be null in forward

  IUMAD_HOST_DEVICE int64_t tiles(int64_t tile = kScanTile) const { return (order.max_length() + tile - 1) / tile; }
  int64_t chunks() const { return (dim + kScanChunk - 1) / kScanChunk; }
};

struct SelectiveScanGradients {
  TokenView out;          // gradient of the output; u's shape
  StateView last_state;   // gradient of the last state; data may be null
  TokenView u, delta, z;  // results; delta has all `dim` channels, also where delta itself has fewer rows
  StateView initial_state;
  // Partial sums in the compute type, to be added over their first dimension(s):
  void *A, *D, *delta_bias;  // (batch, directions, dim, states), (batch, directions, dim) twice
  void *B, *C;  // constant: (batch, directions, dim, states); varying: (parts, batch, directions or 1, groups, pixels, states)
  int64_t B_directions, C_directions;
};

struct SelectiveScanKernels {
  // The work is a number of independent tasks; any split of [0, tasks) over any threads gives the same bits.
  int64_t (*forward_tasks)(const SelectiveScan&);
  void (*forward)(const SelectiveScan&, int64_t begin, int64_t end);
  int64_t (*backward_parts)(const SelectiveScan&);  // the parts of varying B and C: how many channel chunks a group is cut into
  int64_t (*backward_tasks)(const SelectiveScan&);
  void (*backward)(const SelectiveScan&, const SelectiveScanGradients&, int64_t begin, int64_t end);
  // For benchmarks: evaluates that many float exponentials as the scan does and nothing else; returns their sum.
  float (*exponentials)(int64_t count);
};

IUMAD_DECLARE_KERNELS(SelectiveScanKernels, selective_scan)
IUMAD_DECLARE_BF16_KERNELS(SelectiveScanKernels, selective_scan, avx512_bf16)

}  // namespace iumad
