// Elements in memory to the compute type and back, 16 bytes at a time, and the few scalar functions the kernels need.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../core/dtype.h"

namespace iumad::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;  // the lanes that take part in a shuffle

__device__ inline float to_compute(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(__half x) { return __half2float(x); }
__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }

__device__ inline void from_compute(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void from_compute(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void from_compute(float x, float* out) { *out = x; }
__device__ inline void from_compute(double x, double* out) { *out = x; }

// What one 16-byte load or store moves.
template <class T>
struct alignas(16) Vector {
  static constexpr int kItems = 16 / sizeof(T);
  T item[kItems];
};

template <class T>
__device__ inline bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

// Calls f with a null pointer of the element type; float64 is computed in double, the rest in float.
template <class F, class Visitor>
__device__ inline void visit(DType dtype, Visitor&& f) {
  if constexpr (sizeof(F) == 8) {
    f(static_cast<double*>(nullptr));
  } else {
    switch (dtype) {
      case DType::kFloat32:
        return f(static_cast<float*>(nullptr));
      case DType::kBFloat16:
        return f(static_cast<__nv_bfloat16*>(nullptr));
      case DType::kFloat16:
        return f(static_cast<__half*>(nullptr));
      case DType::kFloat64:
        return;  // excluded by the caller: one double tensor makes all of them double
    }
  }
}

// 2^x. float: relative error below 2^-22, results under the smallest normal number are 0 (one instruction on the GPU).
__device__ inline float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ inline double fast_exp2(double x) { return exp2(x); }

template <class F>
constexpr F kLog2E = F(1.442695040888963407359924681001892137L);

// log(1 + e^x), the identity above 20 (as torch.nn.functional.softplus).
template <class F>
__device__ inline F softplus(F x) {
  return x > F(20) ? x : log1p(exp(x));
}

template <class F>
__device__ inline F sigmoid(F x) {
  return F(1) / (F(1) + exp(-x));
}

}  // namespace iumad::cuda
