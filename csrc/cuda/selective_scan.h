// The selective scan on an NVIDIA GPU: what the torch binding calls. Plain C++; the kernels are in the .cu files beside it.
//
// The maths and the params structs are those of core/selective_scan.h. Three things differ from the CPU:
// - the saved states are kTile = 64 tokens apart (tile_states has ceil(length / 64) tiles);
// - SelectiveScanGradients::initial_state is always given (compute type): the adjoint passes from tile to tile through it;
// - the partial sums of varying B and C are (parts, batch, directions, groups, tokens, states), in scan order, added up by
//   sum_projection; those of A, D, delta_bias and constant B, C keep their shape and are added over the batch by sum_parts.
//
// Inside a tile the recurrence is a parallel scan, so decays are multiplied with each other (never divided): a state that is
// infinite, or a decay above 1 whose product overflows, may come out as NaN where a sequential scan has inf.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/selective_scan.h"

namespace iumad::cuda {

constexpr int64_t kTile = 64;

// Threads that share one channel: 8, or 32 where rows are long and too few to fill the GPU otherwise.
int selective_scan_lanes(const SelectiveScan&, int multiprocessors);

// How many channel blocks a group is cut into: the parts of varying B and C.
int64_t selective_scan_parts(const SelectiveScan&, int lanes);

cudaError_t selective_scan(const SelectiveScan&, int lanes, cudaStream_t);
cudaError_t selective_scan_backward(const SelectiveScan&, const SelectiveScanGradients&, int lanes, cudaStream_t);

// One token (row order) from last_state, which it updates; initial_state and tile_states are not read.
cudaError_t selective_state_update(const SelectiveScan&, cudaStream_t);

// The partial sums of a varying B or C to its gradient (batch, out_directions, groups, rows, columns, states): over the channel
// blocks and, where out_directions is 1, over the directions that visit the pixel.
cudaError_t sum_projection(const SelectiveScan&, const void* parts, int64_t count, int64_t out_directions, void* out,
                           cudaStream_t);

}  // namespace iumad::cuda
