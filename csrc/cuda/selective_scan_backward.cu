// Selective scan, backward: tiles from the last to the first, each recomputed from its saved state.
#include "launch.cuh"
#include "selective_scan_tile.cuh"

namespace iumad::cuda {
namespace {

template <class F, int kLanes>
using BackwardGeometry = Geometry<F, kLanes, sizeof(F) == 8 || kLanes == 32 ? 128 : 256, kLanes == 8 ? 4 : 2>;

// Resident blocks per multiprocessor the registers are limited for: 16 warps; 8 in double.
template <class G>
constexpr int kResident = (sizeof(typename G::F) == 8 ? 256 : 512) / G::kThreads;

template <class G>
struct BackwardShared {
  using F = typename G::F;
  // Two tiles, or the warps' sums over their channels [warp][B, C][state][token], never both at once.
  static constexpr int kTile = G::kChannels * G::kPitch, kSums = G::kWarps * 2 * G::kGroup * G::kPitch;
  Work<G, true> work;
  Pixels<G> pixels;
  SharedArray<F, (2 * kTile > kSums ? 2 * kTile : kSums)> scratch;
  typename G::Row B, C;
  typename G::PerChannel A, constant_B, constant_C, start, adjoint;  // per channel and state
  typename G::PerChannel next_adjoint, dA, dB, dC;                   // results; dB, dC of constant B, C
};

// This thread's tokens of a tile: what the states need (dt, u, dy), what they leave (sA, sB; y, where the gate asks for it).
template <class G>
struct BackwardItems : Items<G> {
  using F = typename G::F;
  F dt[G::kItems], u[G::kItems], dy[G::kItems];
  F sA[G::kItems] = {}, sB[G::kItems] = {};  // sum_n g exp(dt A) h_before A, sum_n g B
  F y[G::kItems] = {};
};

// Sum over the lanes of a channel, the same in all of them.
template <class G, class F>
__device__ inline F sum_lanes(F x) {
#pragma unroll
  for (int distance = 1; distance < G::kLanes; distance *= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

// Adds the channels of a warp up: with 8 lanes a channel, each of its 4 channels ends up with a quarter of the 16 sums (dB of
// its 8 tokens, then dC), with 32 lanes there is nothing to add. Writes them to the warp's rows of scratch.
template <class G, class F>
__device__ inline void store_sums(BackwardShared<G>& m, const Items<G>& me, int n, const F (&dB)[G::kItems],
                                  const F (&dC)[G::kItems]) {
  const int warp = threadIdx.x / 32, row = (warp * 2 * G::kGroup + n) * G::kPitch;
  constexpr int kC = G::kGroup * G::kPitch;
  if constexpr (G::kLanes == 32) {
    m.scratch.store(row + G::position(me.first), dB);
    m.scratch.store(row + kC + G::position(me.first), dC);
  } else {
    static_assert(G::kLanes == 8 && G::kItems == 8);
    const bool takes_C = threadIdx.x & 16, upper = threadIdx.x & 8;
    F half[8], quarter[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) half[i] = (takes_C ? dC[i] : dB[i]) + __shfl_xor_sync(kWholeWarp, takes_C ? dB[i] : dC[i], 16);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      quarter[i] = (upper ? half[i + 4] : half[i]) + __shfl_xor_sync(kWholeWarp, upper ? half[i] : half[i + 4], 8);
    m.scratch.store(row + (takes_C ? kC : 0) + G::position(me.first) + (upper ? 4 : 0), quarter);
  }
}

// One state of a tile: forward again from the tile's saved state, then the adjoint from the last token to the first.
template <class G, bool kGate>
__device__ void backward_state(BackwardShared<G>& m, const SelectiveScan& s, BackwardItems<G>& t, int n) {
  using F = typename G::F;
  constexpr int kItems = G::kItems;
  const int channel = n * G::kChannels + t.channel;
  const F A = m.A[channel], a = scaled_decay(A);
  F decay[kItems], before[kItems + 1], coefficient[kItems], product, end;
  t.coefficients(coefficient, m.B, m.constant_B, s.B, n);
  {
    F input[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      decay[i] = fast_exp2(t.dt[i] * a);
      input[i] = t.dt[i] * t.u[i] * coefficient[i];
    }
    before[0] = scan_state<G>(decay, input, m.start[channel], t.lane, &product, &end);
#pragma unroll
    for (int i = 0; i < kItems; ++i) before[i + 1] = decay[i] * before[i] + input[i];
  }

  // q_t = exp(dt_t A) g_t is what a token hands to the one before it: a scan of the pairs (decay, decay C dy), backwards.
  t.coefficients(coefficient, m.C, m.constant_C, s.C, n);
  F q = t.lane == G::kLanes - 1 ? m.adjoint[channel] : F(0);
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) q = decay[i] * (coefficient[i] * t.dy[i] + q);
#pragma unroll
  for (int distance = 1; distance < G::kLanes; distance *= 2) {
    const F q_after = __shfl_down_sync(kWholeWarp, q, distance, G::kLanes);
    const F p_after = __shfl_down_sync(kWholeWarp, product, distance, G::kLanes);
    if (t.lane + distance < G::kLanes) {
      q = product * q_after + q;
      product *= p_after;
    }
  }
  if (t.lane == 0) m.next_adjoint.put(channel, q);
  q = __shfl_down_sync(kWholeWarp, q, 1, G::kLanes);
  if (t.lane == G::kLanes - 1) q = m.adjoint[channel];

  F dB[kItems], dC[kItems], dA = 0;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if constexpr (kGate) t.y[i] += coefficient[i] * before[i + 1];
    dC[i] = t.dy[i] * before[i + 1];
    const F g = coefficient[i] * t.dy[i] + q;
    q = decay[i] * g;
    dB[i] = g;
    const F w = q * before[i];
    dA += w * t.dt[i];
    t.sA[i] += w * A;
  }
  t.coefficients(coefficient, m.B, m.constant_B, s.B, n);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    t.sB[i] += dB[i] * coefficient[i];
    dB[i] *= t.dt[i] * t.u[i];
  }
  dA = sum_lanes<G>(dA);
  if (t.lane == 0) m.dA.put(channel, dA);
  if (s.B.constant || s.C.constant) {
    F sum_B = 0, sum_C = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum_B += dB[i], sum_C += dC[i];
    sum_B = sum_lanes<G>(sum_B);
    sum_C = sum_lanes<G>(sum_C);
    if (t.lane == 0) m.dB.put(channel, sum_B), m.dC.put(channel, sum_C);
  }
  if (!(s.B.constant && s.C.constant)) store_sums(m, t, n, dB, dC);
}

// Adds the warps up and writes this block's part of the gradient of a varying B (which = 0) or C (1), in scan order.
template <class G>
__device__ void store_projection(const BackwardShared<G>& m, const SelectiveScan& s, void* partial, int which, int64_t n0,
                                 int states) {
  using F = typename G::F;
  const Tile& tile = m.work.tile.read();
  const ChannelBlock& b = m.work.block.read();
  const int64_t slice = ((b.part * s.batch + b.batch) * s.order.directions() + tile.k) * s.groups + b.group;
  F* out = static_cast<F*>(partial) + (slice * s.order.max_length() + tile.first) * s.states + n0;
  for (int i = thread_index(); i < tile.count * states; i += G::kThreads) {
    const int t = i / states, n = i % states;
    F sum = 0;
    for (int warp = 0; warp < G::kWarps; ++warp)
      sum += m.scratch[((warp * 2 + which) * G::kGroup + n) * G::kPitch + G::position(t)];
    out[t * s.states + n] = sum;
  }
}

// The states [n0, n0 + kGroup) of a tile.
template <class G, bool kGate>
__device__ void backward_group(BackwardShared<G>& m, const SelectiveScan& s, const SelectiveScanGradients& d, BackwardItems<G>& t,
                               bool last_tile, int n0) {
  using F = typename G::F;
  const Tile& tile = m.work.tile.read();
  const ChannelBlock& b = m.work.block.read();
  const int states = int(s.states) - n0 < G::kGroup ? int(s.states) - n0 : G::kGroup;
  const int64_t parameters = (tile.k * s.dim + b.channel) * s.states;
  const int64_t partial = ((b.batch * s.order.directions() + tile.k) * s.dim + b.channel) * s.states;
  StateView saved{s.tile_states, sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32, 0, 0, 1, s.dim};
  saved.direction = s.tiles(kTile) * s.states * s.dim;
  saved.batch = s.order.directions() * saved.direction;
  // Counted from the tile's own first saved state; a direction without tokens has none.
  if (tile.count > 0) {
    saved.data = static_cast<F*>(s.tile_states) + tile.first / kTile * s.states * s.dim;
  } else {
    saved.data = nullptr;
  }
  load_per_channel<G>(m.A, static_cast<const F*>(s.A) + parameters, s, n0, states, b);
  load_state<G>(m.start, saved, s, tile.k, n0, states, b);
  load_state<G>(m.adjoint, last_tile ? d.last_state : d.initial_state, s, tile.k, n0, states, b);
  load_projection<G>(m.B, m.constant_B, s, s.B, n0, states, m.pixels, tile, b);
  load_projection<G>(m.C, m.constant_C, s, s.C, n0, states, m.pixels, tile, b);
  __syncthreads();
  for (int n = 0; n < states; ++n) backward_state<G, kGate>(m, s, t, n);
  __syncthreads();
  store_state<G>(m.next_adjoint, d.initial_state, tile.k, n0, states, b);  // where the tile before starts
  store_per_channel<G>(m.dA, static_cast<F*>(d.A) + partial, !last_tile, s, n0, states, b);
  if (s.B.constant) {
    store_per_channel<G>(m.dB, static_cast<F*>(d.B) + partial, !last_tile, s, n0, states, b);
  } else {
    store_projection(m, s, d.B, 0, n0, states);
  }
  if (s.C.constant) {
    store_per_channel<G>(m.dC, static_cast<F*>(d.C) + partial, !last_tile, s, n0, states, b);
  } else {
    store_projection(m, s, d.C, 1, n0, states);
  }
  __syncthreads();
}

template <class G, bool kGate>
__device__ void backward_tile(BackwardShared<G>& m, const SelectiveScan& s, const SelectiveScanGradients& d, bool last_tile,
                              typename G::F* dD, typename G::F* dbias) {
  using F = typename G::F;
  constexpr int kItems = G::kItems, kOther = BackwardShared<G>::kTile;
  const Tile& tile = m.work.tile.read();
  const ChannelBlock& b = m.work.block.read();
  BackwardItems<G> t;
  m.pixels.locate(tile);
  __syncthreads();
  load_tile<G>(m.scratch, 0, s, s.u, s.dim, m.pixels, tile, b);
  load_tile<G>(m.scratch, kOther, s, s.delta, s.delta_rows, m.pixels, tile, b);
  __syncthreads();
  m.scratch.load(t.at(), t.u);
  m.scratch.load(t.at() + kOther, t.dt);
  t.finish_delta(t.dt, s, tile, b);
  __syncthreads();
  load_tile<G>(m.scratch, 0, s, d.out, s.dim, m.pixels, tile, b);
  if constexpr (kGate) load_tile<G>(m.scratch, kOther, s, s.z, s.dim, m.pixels, tile, b);
  __syncthreads();
  m.scratch.load(t.at(), t.dy);
  if constexpr (kGate) {
    F z[kItems];
    m.scratch.load(t.at() + kOther, z);
#pragma unroll
    for (int i = 0; i < kItems; ++i) t.dy[i] *= z[i] * sigmoid(z[i]);
  }
  __syncthreads();
  for (int n0 = 0; n0 < int(s.states); n0 += G::kGroup) backward_group<G, kGate>(m, s, d, t, last_tile, n0);

  const F skip = t.skip(s, tile, b);
  const bool again = tile.k > b.k_begin;  // an earlier direction has written these pixels
  if constexpr (kGate) {
    load_tile<G>(m.scratch, 0, s, d.out, s.dim, m.pixels, tile, b);
    load_tile<G>(m.scratch, kOther, s, s.z, s.dim, m.pixels, tile, b);
    __syncthreads();
    F z[kItems], dz[kItems];
    m.scratch.load(t.at(), dz);
    m.scratch.load(t.at() + kOther, z);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const F gate = sigmoid(z[i]);
      dz[i] *= (t.y[i] + skip * t.u[i]) * gate * (1 + z[i] * (1 - gate));
    }
    m.scratch.store(t.at(), dz);
    __syncthreads();
    store_tile<G>(m.scratch, 0, s, d.z, again, m.pixels, tile, b);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const F slope = s.delta_softplus ? -expm1(-t.dt[i]) : F(1);  // of softplus, from its value
    const F ddelta = t.first + i < tile.count ? (t.u[i] * t.sB[i] + t.sA[i]) * slope : F(0);
    *dD += t.dy[i] * t.u[i];
    *dbias += ddelta;
    t.sA[i] = ddelta;
    t.sB[i] = t.dt[i] * t.sB[i] + skip * t.dy[i];
  }
  m.scratch.store(t.at(), t.sB);
  m.scratch.store(t.at() + kOther, t.sA);
  __syncthreads();
  store_tile<G>(m.scratch, 0, s, d.u, again, m.pixels, tile, b);
  store_tile<G>(m.scratch, kOther, s, d.delta, again && d.delta.direction == 0, m.pixels, tile, b);
  __syncthreads();  // before the next tile takes over the shared memory
}

template <class G, bool kGate>
__global__ void __launch_bounds__(G::kThreads, kResident<G>)
    selective_scan_backward_kernel(const __grid_constant__ SelectiveScan s, const __grid_constant__ SelectiveScanGradients d) {
  using F = typename G::F;
  __shared__ BackwardShared<G> m;
  if (threadIdx.x == 0) m.work.start(s);
  __syncthreads();
  while (m.work.number.read() >= 0) {
    F dD = 0, dbias = 0;
    for (bool last_tile = true;; last_tile = false) {
      backward_tile<G, kGate>(m, s, d, last_tile, &dD, &dbias);
      const int64_t next = m.work.tile.read().first - G::kTokens;
      __syncthreads();
      if (next < 0) break;
      if (threadIdx.x == 0) m.work.tile.write().move_to(next, G::kTokens);
      __syncthreads();
    }
    dD = sum_lanes<G>(dD);
    dbias = sum_lanes<G>(dbias);
    const ChannelBlock& b = m.work.block.read();
    const int c = threadIdx.x / G::kLanes;
    if (threadIdx.x % G::kLanes == 0 && c < b.channels) {
      const int64_t i = (b.batch * s.order.directions() + m.work.tile.read().k) * s.dim + b.channel + c;
      if (d.D) static_cast<F*>(d.D)[i] = dD;
      if (d.delta_bias) static_cast<F*>(d.delta_bias)[i] = dbias;
    }
    __syncthreads();
    if (threadIdx.x == 0) m.work.next_direction(s);
    __syncthreads();
  }
}

template <class F, int kLanes>
cudaError_t run(const SelectiveScan& s, const SelectiveScanGradients& d, cudaStream_t stream) {
  using G = BackwardGeometry<F, kLanes>;
  return s.z.data ? launch(selective_scan_backward_kernel<G, true>, block_count<G>(s), G::kThreads, stream, s, d)
                  : launch(selective_scan_backward_kernel<G, false>, block_count<G>(s), G::kThreads, stream, s, d);
}

}  // namespace

int64_t selective_scan_parts(const SelectiveScan& s, int lanes) {
  if (s.is_double) return parts_per_group<BackwardGeometry<double, 8>>(s);
  return lanes == 32 ? parts_per_group<BackwardGeometry<float, 32>>(s) : parts_per_group<BackwardGeometry<float, 8>>(s);
}

cudaError_t selective_scan_backward(const SelectiveScan& s, const SelectiveScanGradients& d, int lanes, cudaStream_t stream) {
  if (s.is_double) return run<double, 8>(s, d, stream);
  return lanes == 32 ? run<float, 32>(s, d, stream) : run<float, 8>(s, d, stream);
}

}  // namespace iumad::cuda
