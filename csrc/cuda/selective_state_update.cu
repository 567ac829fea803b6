// One token of a selective scan with the state updated in place, the step of a generation. The state's way through memory is
// all it costs: it is read and written 16 bytes at a time by neighbouring threads, and nothing is left of the scan's tiles.
#include <type_traits>

#include "element.cuh"
#include "launch.cuh"
#include "selective_scan.h"

namespace iumad::cuda {
namespace {

constexpr int kThreads = 128, kLanes = 4, kChannels = kThreads / kLanes;

// Resident blocks per multiprocessor the registers are limited for: half of its threads; a quarter in double.
template <class F>
constexpr int kResident = sizeof(F) == 8 ? 4 : 8;

template <class F>
__device__ F load(const TokenView& v, int64_t batch, int64_t channel) {
  F value = 0;
  visit<F>(v.dtype,
           [&](auto* null) { value = to_compute(static_cast<decltype(null)>(v.data)[batch * v.batch + channel * v.channel]); });
  return value;
}

// B or C of a channel. A single group, the usual case, costs no division.
template <class F>
__device__ const F* coefficients(const SelectiveScan& s, const ProjectionView& v, int64_t batch, int64_t channel) {
  const F* data = static_cast<const F*>(v.data);
  if (v.constant) return data + channel * s.states;
  return data + batch * v.batch + (s.groups == 1 ? 0 : channel / (s.dim / s.groups) * v.group);
}

// N elements from p on, of which `count` exist: 16 bytes at a time where they lie side by side.
template <class T, class F, int N>
__device__ void load_run(const T* p, int64_t stride, int64_t count, F (&out)[N]) {
  constexpr int V = Vector<T>::kItems;
  if (stride == 1 && count >= N && aligned(p)) {
#pragma unroll
    for (int i = 0; i < N; i += V) {
      const Vector<T> v = *reinterpret_cast<const Vector<T>*>(p + i);
#pragma unroll
      for (int j = 0; j < V; ++j) out[i + j] = to_compute(v.item[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = i < count ? F(to_compute(p[i * stride])) : F(0);
  }
}

template <class T, class F>
__device__ void store_vector(T* p, int64_t stride, int64_t count, const F (&in)[Vector<T>::kItems]) {
  constexpr int V = Vector<T>::kItems;
  if (stride == 1 && count >= V && aligned(p)) {
    Vector<T> v;
#pragma unroll
    for (int i = 0; i < V; ++i) from_compute(in[i], &v.item[i]);
    *reinterpret_cast<Vector<T>*>(p) = v;
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i < count) from_compute(in[i], p + i * stride);
    }
  }
}

// Updates every kLanes-th vector of a channel's states from `lane` on; their share of y.
template <class F>
__device__ F update_states(const SelectiveScan& s, int64_t batch, int64_t channel, int lane, F dt, F x) {
  const StateView& view = s.last_state;
  const F* A = static_cast<const F*>(s.A) + channel * s.states;
  const F *B = coefficients<F>(s, s.B, batch, channel), *C = coefficients<F>(s, s.C, batch, channel);
  const F exponent = dt * kLog2E<F>, input = dt * x;
  F y = 0;
  visit<F>(view.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    constexpr int V = Vector<T>::kItems;
    T* state = static_cast<T*>(view.data) + batch * view.batch + channel * view.channel;
    for (int64_t n = lane * V; n < s.states; n += kLanes * V) {
      const int64_t count = s.states - n;
      F h[V], a[V], b[V], c[V];
      load_run(state + n * view.state, view.state, count, h);
      load_run(A + n, 1, count, a);
      load_run(B + n, 1, count, b);
      load_run(C + n, 1, count, c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        h[i] = fast_exp2(exponent * a[i]) * h[i] + input * b[i];
        if (i < count) y += c[i] * h[i];
      }
      store_vector(state + n * view.state, view.state, count, h);
    }
  });
  return y;
}

__host__ __device__ inline int64_t blocks_per_row(const SelectiveScan& s) { return (s.dim + kChannels - 1) / kChannels; }

// A block owns kChannels neighbouring channels of a batch entry; kLanes neighbouring threads share one.
template <class F>
__global__ void __launch_bounds__(kThreads, kResident<F>) selective_state_update_kernel(const __grid_constant__ SelectiveScan s) {
  const int lane = int(threadIdx.x) % kLanes;
  for (int64_t block = blockIdx.x; block < s.batch * blocks_per_row(s); block += gridDim.x) {
    const int64_t batch = block / blocks_per_row(s);
    const int64_t channel = (block - batch * blocks_per_row(s)) * kChannels + int(threadIdx.x) / kLanes;
    const bool exists = channel < s.dim;  // the others still take part in the shuffles
    F x = 0, y = 0;
    if (exists) {
      x = load<F>(s.u, batch, channel);
      F dt = load<F>(s.delta, batch, s.delta_rows == s.dim ? channel : channel * s.delta_rows / s.dim);
      if (s.delta_bias) dt += static_cast<const F*>(s.delta_bias)[channel];
      if (s.delta_softplus) dt = softplus(dt);
      y = update_states<F>(s, batch, channel, lane, dt, x);
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) y += __shfl_xor_sync(kWholeWarp, y, distance, kLanes);
    if (!exists || lane > 0) continue;
    if (s.D) y += static_cast<const F*>(s.D)[channel] * x;
    if (s.z.data) {
      const F z = load<F>(s.z, batch, channel);
      y *= z * sigmoid(z);
    }
    visit<F>(s.out.dtype, [&](auto* null) {
      from_compute(y, static_cast<decltype(null)>(s.out.data) + batch * s.out.batch + channel * s.out.channel);
    });
  }
}

template <class F>
cudaError_t run(const SelectiveScan& s, cudaStream_t stream) {
  return launch(selective_state_update_kernel<F>, s.batch * blocks_per_row(s), kThreads, stream, s);
}

}  // namespace

cudaError_t selective_state_update(const SelectiveScan& s, cudaStream_t stream) {
  return s.is_double ? run<double>(s, stream) : run<float>(s, stream);
}

}  // namespace iumad::cuda
