// Kernels that are right, and kernels each with one mistake a GPU would not report: `emulator_cases NAME` runs one and prints
// what the emulator found, or "fine". Driven by test_emulator.py.
#include <cstdio>
#include <map>
#include <vector>

#include "checked_shared_array.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

using iumad::cuda::SharedArray;

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 96;

// ---- right ---------------------------------------------------------------------------------------------------------------

void block_sum(const float* in, float* out) {
  __shared__ SharedArray<float, kThreads / 32> sums;
  float x = in[blockIdx.x * blockDim.x + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(kAll, x, distance);
  if (threadIdx.x % 32 == 0) sums.put(threadIdx.x / 32, x);
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1] + sums[2];
  __syncthreads();
}

void warp_functions(int* out) {
  const int lane = threadIdx.x % 32;
  int ok = __shfl_sync(kAll, lane, 3) == 3 && __shfl_sync(kAll, lane, 1, 8) == lane / 8 * 8 + 1;
  ok = ok && __shfl_up_sync(kAll, lane, 2, 8) == (lane % 8 < 2 ? lane : lane - 2);
  ok = ok && __shfl_down_sync(kAll, lane, 3, 16) == (lane % 16 > 12 ? lane : lane + 3);
  ok = ok && __shfl_xor_sync(kAll, lane, 5) == (lane ^ 5) && __shfl_sync(kAll, double(lane), 31) == 31.0;
  ok = ok && __ballot_sync(kAll, lane % 2) == 0xaaaaaaaau && __any_sync(kAll, lane == 7) && !__all_sync(kAll, lane != 7);
  if (lane < 16) ok = ok && __ballot_sync(0xffffu, 1) == 0xffffu;  // half a warp, with the right mask
  out[blockIdx.x * blockDim.x + threadIdx.x] = ok;
}

void exchange_in_warp(int* out) {
  __shared__ SharedArray<int, 32> a;
  a.put(threadIdx.x, threadIdx.x);
  __syncwarp();
  const int x = a[31 - threadIdx.x];
  __syncwarp();
  a.put(threadIdx.x, x);
  out[threadIdx.x] = a[threadIdx.x];
}

// ---- wrong ---------------------------------------------------------------------------------------------------------------

void missing_barrier(float* out) {
  __shared__ SharedArray<float, kThreads> a;
  a.put(threadIdx.x, 1.0f);
  out[threadIdx.x] = a[kThreads - 1 - threadIdx.x];
}

void write_after_read(float* out) {
  __shared__ SharedArray<float, kThreads> a;
  a.put(threadIdx.x, 1.0f);
  __syncthreads();
  out[threadIdx.x] = a[(threadIdx.x + 1) % kThreads];
  a.put(threadIdx.x, 2.0f);
}

void two_writers(float*) {
  __shared__ SharedArray<float, 8> a;
  a.put(threadIdx.x / 32, 1.0f);
}

void race_in_warp(float* out) {  // a shuffle orders no memory
  __shared__ SharedArray<float, 32> a;
  a.put(threadIdx.x % 32, 1.0f);
  __shfl_sync(kAll, 0, 0);
  out[threadIdx.x] = a[31 - threadIdx.x % 32];
}

void syncwarp_across_warps(float* out) {  // orders one warp only
  __shared__ SharedArray<float, kThreads> a;
  a.put(threadIdx.x, 1.0f);
  __syncwarp();
  out[threadIdx.x] = a[(threadIdx.x + 32) % kThreads];
}

void uninitialised(float* out) {
  __shared__ SharedArray<float, kThreads> a;
  if (threadIdx.x != 5) a.put(threadIdx.x, 1.0f);
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x];
}

void kept_from_the_block_before(float* out) {
  __shared__ SharedArray<float, kThreads> a;
  if (blockIdx.x == 0) a.put(threadIdx.x, 1.0f);
  __syncthreads();
  out[threadIdx.x] = a[threadIdx.x];
}

void shared_out_of_bounds(float*) {
  __shared__ SharedArray<float, kThreads - 1> a;
  a.put(threadIdx.x, 1.0f);
}

void misaligned(float* out) {
  __shared__ SharedArray<float, 8> a;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; ++i) a.put(i, 0.0f);
    float x[4];
    a.load(2, x);
    out[0] = x[0];
  }
}

void divergent_barrier(float*) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void ended_before_barrier(float*) {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

void mask_lacks_caller(float*) { __shfl_sync(0x0000ffffu, 1, 0); }

void mask_too_wide(float*) {  // half the warp shuffles, the mask names all of it
  if (threadIdx.x % 32 < 16) __shfl_sync(kAll, 1, 0);
}

void masks_differ(float*) { __shfl_xor_sync(threadIdx.x % 32 < 16 ? kAll : 0xffff0000u, 1, 1); }

void collectives_differ(float*) {
  if (threadIdx.x % 32 < 16) {
    __shfl_sync(kAll, 1, 0);
  } else {
    __ballot_sync(kAll, 1);
  }
}

void source_outside_mask(float*) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0x0000ffffu, 1, 20);
}

void barrier_against_shuffle(float*) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __shfl_sync(kAll, 1, 16);
  }
}

void global_out_of_bounds(float* out) { out[blockIdx.x * blockDim.x + threadIdx.x + 1] = 1.0f; }

void exact_conversions() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const __nv_bfloat16 b{uint16_t(bits)};
    const float f = __bfloat162float(b);
    if (f == f && __float2bfloat16_rn(f).bits != bits) throw emulation::Error("bfloat16 does not survive a round trip");
  }
  if (__float2bfloat16_rn(1.00390625f).bits != 0x3f80 || __float2bfloat16_rn(1.01171875f).bits != 0x3f82)
    throw emulation::Error("bfloat16 ties do not go to even");
  if (__half2float(__float2half_rn(65519.0f)) != 65504.0f) throw emulation::Error("float16 rounding");
}

template <class T>
void run(void (*kernel)(T*), int blocks, int threads, std::vector<T>& out) {
  cudaLaunchConfig_t config;
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  cudaLaunchKernelEx(&config, kernel, out.data());
}

void right() {
  for (const emulation::Order order : {emulation::Order::kForward, emulation::Order::kReverse, emulation::Order::kShuffled}) {
    emulation::order = order;
    constexpr int kBlocks = 3;
    std::vector<float> in(kBlocks * kThreads), out(kBlocks);
    for (size_t i = 0; i < in.size(); ++i) in[i] = float(i);
    cudaLaunchConfig_t config;
    config.gridDim = dim3(kBlocks);
    config.blockDim = dim3(kThreads);
    cudaLaunchKernelEx(&config, block_sum, static_cast<const float*>(in.data()), out.data());
    for (int b = 0; b < kBlocks; ++b)
      if (out[b] != kThreads * (b * kThreads + (kThreads - 1) / 2.0f)) throw emulation::Error("block_sum is wrong");
    std::vector<int> ok(2 * 64);
    run(warp_functions, 2, 64, ok);
    for (int x : ok)
      if (!x) throw emulation::Error("a warp function is wrong");
    std::vector<int> reversed(32);
    run(exchange_in_warp, 1, 32, reversed);
    for (int i = 0; i < 32; ++i)
      if (reversed[i] != 31 - i) throw emulation::Error("exchange_in_warp is wrong");
  }
}

}  // namespace

int main(int, char** argv) {
  const std::map<std::string, void (*)(float*)> wrong = {
      {"missing_barrier", missing_barrier},
      {"write_after_read", write_after_read},
      {"two_writers", two_writers},
      {"race_in_warp", race_in_warp},
      {"syncwarp_across_warps", syncwarp_across_warps},
      {"uninitialised", uninitialised},
      {"kept_from_the_block_before", kept_from_the_block_before},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"misaligned", misaligned},
      {"divergent_barrier", divergent_barrier},
      {"ended_before_barrier", ended_before_barrier},
      {"mask_lacks_caller", mask_lacks_caller},
      {"mask_too_wide", mask_too_wide},
      {"masks_differ", masks_differ},
      {"collectives_differ", collectives_differ},
      {"source_outside_mask", source_outside_mask},
      {"barrier_against_shuffle", barrier_against_shuffle},
      {"global_out_of_bounds", global_out_of_bounds},
  };
  const std::string name = argv[1];
  try {
    if (name == "right") {
      right();
    } else if (name == "exact_conversions") {
      exact_conversions();
    } else {
      std::vector<float> out(2 * kThreads);
      run(wrong.at(name), 2, kThreads, out);
    }
  } catch (const emulation::Error& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("fine");
}
