// What the bindings of CUDA kernels need besides common.h: the device and stream to launch on, errors, sums in a fixed order.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/sum_parts.h"
#include "common.h"

// Part of torch's stable ABI, but declared only where its headers are used with USE_CUDA; lives in the CUDA build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace iumad {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "iumad_kernels: a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

// Makes the tensor's device the current one for its lifetime.
struct CudaContext {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int multiprocessors;

  explicit CudaContext(const Tensor& t) : guard(t.get_device_index()) {
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &handle));
    stream = static_cast<cudaStream_t>(handle);
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  }
};

// Sum over the first dimension of a contiguous float or double tensor, always in the order 0, 1, 2, ...
inline Tensor sum_parts(const Tensor& parts, cudaStream_t stream) {
  if (parts.size(0) == 1) return torch::stable::select(parts, 0, 0);
  const auto sizes = parts.sizes();
  Tensor out = empty(parts, Shape(sizes.begin() + 1, sizes.end()), parts.scalar_type());
  check(cuda::sum_parts(parts.data_ptr(), parts.size(0), out.numel(), out.data_ptr(), parts.element_size() == 8, stream));
  return out;
}

}  // namespace iumad
