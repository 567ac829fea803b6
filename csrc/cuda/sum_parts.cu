#include "launch.cuh"
#include "sum_parts.h"

namespace iumad::cuda {
namespace {

template <class F>
__global__ void sum_parts_kernel(const F* parts, int64_t count, int64_t size, F* out) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
    F sum = 0;
    for (int64_t p = 0; p < count; ++p) sum += parts[p * size + i];
    out[i] = sum;
  }
}

template <class F>
cudaError_t run(const void* parts, int64_t count, int64_t size, void* out, cudaStream_t stream) {
  constexpr int kThreads = 128;
  return launch(sum_parts_kernel<F>, (size + kThreads - 1) / kThreads, kThreads, stream, static_cast<const F*>(parts), count,
                size, static_cast<F*>(out));
}

}  // namespace

cudaError_t sum_parts(const void* parts, int64_t count, int64_t size, void* out, bool is_double, cudaStream_t stream) {
  return is_double ? run<double>(parts, count, size, out, stream) : run<float>(parts, count, size, out, stream);
}

}  // namespace iumad::cuda
