// The few names of CUDA's runtime that host code uses.
#pragma once

#include <cstdlib>

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0, cudaErrorUnknown = 999 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* number = std::getenv("EMULATED_MULTIPROCESSORS");
  *value = number ? std::atoi(number) : 1;
  return cudaSuccess;
}
