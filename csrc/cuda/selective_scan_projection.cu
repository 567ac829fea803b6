// The gradients of varying B and C: partial sums per channel block and direction, in scan order, to the tensors' own layout.
#include "launch.cuh"
#include "selective_scan.h"

namespace iumad::cuda {
namespace {

// One thread per element of out (batch, out_directions, groups, rows, columns, states).
template <class F>
__global__ void sum_projection_kernel(const __grid_constant__ SelectiveScan s, const F* parts, int64_t count,
                                      int64_t out_directions, F* out, int64_t size) {
  const int64_t K = s.order.directions(), length = s.order.max_length(), part = s.batch * K * s.groups * length * s.states;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    int64_t rest = i;
    const int64_t n = rest % s.states;
    rest /= s.states;
    const int64_t column = rest % s.order.columns;
    rest /= s.order.columns;
    const int64_t row = rest % s.order.rows;
    rest /= s.order.rows;
    const int64_t group = rest % s.groups;
    rest /= s.groups;
    const int64_t k_out = rest % out_directions, batch = rest / out_directions;
    F sum = 0;
    for (int64_t k = out_directions == 1 ? 0 : k_out; k < (out_directions == 1 ? K : k_out + 1); ++k) {
      const int64_t token = s.order.direction(k).token(row, column);
      if (token < 0) continue;
      const F* p = parts + (((batch * K + k) * s.groups + group) * length + token) * s.states + n;
      for (int64_t q = 0; q < count; ++q) sum += p[q * part];
    }
    out[i] = sum;
  }
}

template <class F>
cudaError_t run(const SelectiveScan& s, const void* parts, int64_t count, int64_t out_directions, void* out,
                cudaStream_t stream) {
  constexpr int kThreads = 128;
  const int64_t size = s.batch * out_directions * s.groups * s.order.rows * s.order.columns * s.states;
  return launch(sum_projection_kernel<F>, (size + kThreads - 1) / kThreads, kThreads, stream, s, static_cast<const F*>(parts),
                count, out_directions, static_cast<F*>(out), size);
}

}  // namespace

cudaError_t sum_projection(const SelectiveScan& s, const void* parts, int64_t count, int64_t out_directions, void* out,
                           cudaStream_t stream) {
  return s.is_double ? run<double>(s, parts, count, out_directions, out, stream)
                     : run<float>(s, parts, count, out_directions, out, stream);
}

}  // namespace iumad::cuda
