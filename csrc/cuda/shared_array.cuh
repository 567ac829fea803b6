// An array in shared memory. Every access goes through this type, so that tests/cuda_emulation can replace it by one that
// checks bounds, initialisation and races; on the GPU it is a plain array.
#pragma once

#if defined(IUMAD_CUDA_EMULATION)
#include "checked_shared_array.h"
#else

#include "element.cuh"

namespace iumad::cuda {

template <class T, int kSize>
struct alignas(16) SharedArray {
  T data[kSize];

  __device__ T operator[](int i) const { return data[i]; }
  __device__ void put(int i, T value) { data[i] = value; }

  // n consecutive elements from a 16-byte boundary on.
  template <int n>
  __device__ void load(int i, T (&out)[n]) const {
    using V = Vector<T>;
    static_assert(n % V::kItems == 0);
#pragma unroll
    for (int j = 0; j < n; j += V::kItems) {
      const V v = *reinterpret_cast<const V*>(data + i + j);
#pragma unroll
      for (int l = 0; l < V::kItems; ++l) out[j + l] = v.item[l];
    }
  }
  template <int n>
  __device__ void store(int i, const T (&in)[n]) {
    using V = Vector<T>;
    static_assert(n % V::kItems == 0);
#pragma unroll
    for (int j = 0; j < n; j += V::kItems) {
      V v;
#pragma unroll
      for (int l = 0; l < V::kItems; ++l) v.item[l] = in[j + l];
      *reinterpret_cast<V*>(data + i + j) = v;
    }
  }
};

// One object in shared memory, written by one thread between two barriers and read by all.
template <class T>
struct SharedObject {
  T value;

  __device__ const T& read() const { return value; }
  __device__ T& write() { return value; }
};

}  // namespace iumad::cuda

#endif
