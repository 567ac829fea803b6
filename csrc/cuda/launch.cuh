// Starts a kernel on a one-dimensional grid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace iumad::cuda {

// The kernel runs its blocks in a grid-stride loop, so any number of them fits the grid's limit of 2^31 - 1.
template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Parameters... arguments) {
  if (blocks == 0) return cudaSuccess;
  constexpr int64_t kLargestGrid = 2147483647;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks < kLargestGrid ? blocks : kLargestGrid));
  config.blockDim = dim3(unsigned(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace iumad::cuda
