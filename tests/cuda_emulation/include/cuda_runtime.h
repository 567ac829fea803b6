// Stands in for CUDA's header of the same name: the language extensions a kernel uses, as C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "emulator.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

inline const uint3 &threadIdx = emulation::emulator().thread_index, &blockIdx = emulation::emulator().block_index;
inline const dim3 &blockDim = emulation::emulator().block, &gridDim = emulation::emulator().grid;

using std::exp;
using std::exp2;
using std::expm1;
using std::log1p;

using Where = std::source_location;

inline void __syncthreads(Where where = Where::current()) { emulation::emulator().barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, Where where = Where::current()) {
  emulation::emulator().meet(emulation::Collective::kSync, mask, 0, 0, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, Where where = Where::current()) {
  const int lane = emulation::emulator().current->lane, base = lane / width * width;
  return emulation::shuffle(mask, value, base + ((source % width) + width) % width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, Where where = Where::current()) {
  const int lane = emulation::emulator().current->lane, base = lane / width * width, source = lane - int(distance);
  return emulation::shuffle(mask, value, source < base ? lane : source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, Where where = Where::current()) {
  const int lane = emulation::emulator().current->lane, end = lane / width * width + width, source = lane + int(distance);
  return emulation::shuffle(mask, value, source >= end ? lane : source, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, Where where = Where::current()) {
  const int lane = emulation::emulator().current->lane, end = lane / width * width + width, source = lane ^ bits;
  return emulation::shuffle(mask, value, source >= end ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return unsigned(emulation::emulator().meet(emulation::Collective::kVote, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> copies(arguments...);  // a kernel sees the values of launch time
  emulation::emulator().run(config->gridDim, config->blockDim, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
