// Sums of partial results, in a fixed order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace iumad::cuda {

// out[i] = parts[0][i] + parts[1][i] + ..., in this order; float or double.
cudaError_t sum_parts(const void* parts, int64_t count, int64_t size, void* out, bool is_double, cudaStream_t);

}  // namespace iumad::cuda
