// Selective scan, forward.
#include "launch.cuh"
#include "selective_scan_tile.cuh"

namespace iumad::cuda {
namespace {

template <class F, int kLanes>
using ForwardGeometry = Geometry<F, kLanes, sizeof(F) == 8 || kLanes == 32 ? 128 : 256, 8>;

// Resident blocks per multiprocessor the registers are limited for: 24 warps; 12 in double.
template <class G>
constexpr int kResident = (sizeof(typename G::F) == 8 ? 384 : 768) / G::kThreads;

template <class G>
struct ForwardShared {
  Work<G, false> work;
  Pixels<G> pixels;
  SharedArray<typename G::F, 2 * G::kChannels * G::kPitch> tiles;  // u and delta; then z and out
  typename G::Row B, C;
  typename G::PerChannel A, constant_B, constant_C, start, end;
};

// The states [n0, n0 + states) of a tile: adds their share to y.
template <class G, class F>
__device__ void scan_group(ForwardShared<G>& m, const SelectiveScan& s, const Items<G>& me, const Tile& tile,
                           const ChannelBlock& b, int64_t n0, int states, const F (&dt)[G::kItems], const F (&dtu)[G::kItems],
                           F (&y)[G::kItems]) {
  for (int n = 0; n < states; ++n) {
    const int channel = n * G::kChannels + me.channel;
    const F a = scaled_decay(m.A[channel]);
    F decay[G::kItems], input[G::kItems], coefficient[G::kItems], product, end;
    me.coefficients(coefficient, m.B, m.constant_B, s.B, n);
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) {
      decay[i] = fast_exp2(dt[i] * a);
      input[i] = dtu[i] * coefficient[i];
    }
    F h = scan_state<G>(decay, input, m.start[channel], me.lane, &product, &end);
    if (me.lane == G::kLanes - 1) m.end.put(channel, end);
    if (s.tile_states && me.channel < b.channels && me.first % kTile == 0 && me.first < tile.count) {
      const int64_t index = (tile.first + me.first) / kTile;
      F* saved = static_cast<F*>(s.tile_states) + b.channel + me.channel;
      saved[(((b.batch * s.order.directions() + tile.k) * s.tiles(kTile) + index) * s.states + n0 + n) * s.dim] = h;
    }
    me.coefficients(coefficient, m.C, m.constant_C, s.C, n);
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) {
      h = decay[i] * h + input[i];
      y[i] += coefficient[i] * h;
    }
  }
}

template <class G>
__device__ void forward_tile(ForwardShared<G>& m, const SelectiveScan& s) {
  using F = typename G::F;
  constexpr int kOther = G::kChannels * G::kPitch;
  const Items<G> me;
  const Tile& tile = m.work.tile.read();
  const ChannelBlock& b = m.work.block.read();
  m.pixels.locate(tile);
  __syncthreads();
  load_tile<G>(m.tiles, 0, s, s.u, s.dim, m.pixels, tile, b);
  load_tile<G>(m.tiles, kOther, s, s.delta, s.delta_rows, m.pixels, tile, b);
  __syncthreads();
  F dt[G::kItems], dtu[G::kItems], y[G::kItems];
  m.tiles.load(me.at(), dtu);
  m.tiles.load(me.at() + kOther, dt);
  me.finish_delta(dt, s, tile, b);
  const F skip = me.skip(s, tile, b);
#pragma unroll
  for (int i = 0; i < G::kItems; ++i) {
    y[i] = skip * dtu[i];
    dtu[i] *= dt[i];
  }

  for (int n0 = 0; n0 < int(s.states); n0 += G::kGroup) {
    const int states = int(s.states) - n0 < G::kGroup ? int(s.states) - n0 : G::kGroup;
    __syncthreads();                                                     // the group before is done with its coefficients
    const int64_t parameters = (tile.k * s.dim + b.channel) * s.states;  // in the loop: no register carries it along
    load_per_channel<G>(m.A, static_cast<const F*>(s.A) + parameters, s, n0, states, b);
    load_state<G>(m.start, tile.first == 0 ? s.initial_state : s.last_state, s, tile.k, n0, states, b);
    load_projection<G>(m.B, m.constant_B, s, s.B, n0, states, m.pixels, tile, b);
    load_projection<G>(m.C, m.constant_C, s, s.C, n0, states, m.pixels, tile, b);
    __syncthreads();
    scan_group<G>(m, s, me, tile, b, n0, states, dt, dtu, y);
    __syncthreads();
    store_state<G>(m.end, s.last_state, tile.k, n0, states, b);  // where the next tile starts
  }

  if (s.z.data) {
    load_tile<G>(m.tiles, kOther, s, s.z, s.dim, m.pixels, tile, b);
    __syncthreads();
    F z[G::kItems];
    m.tiles.load(Items<G>().at() + kOther, z);
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) y[i] *= z[i] * sigmoid(z[i]);
  }
  m.tiles.store(Items<G>().at(), y);
  __syncthreads();
  store_tile<G>(m.tiles, 0, s, s.out, tile.k > b.k_begin, m.pixels, tile, b);
  __syncthreads();  // before the next tile takes over the shared memory
}

template <class G>
__global__ void __launch_bounds__(G::kThreads, kResident<G>) selective_scan_forward(const __grid_constant__ SelectiveScan s) {
  __shared__ ForwardShared<G> m;
  if (threadIdx.x == 0) m.work.start(s);
  __syncthreads();
  while (m.work.number.read() >= 0) {
    for (;;) {  // at least one tile: an empty direction still hands its initial state on
      forward_tile<G>(m, s);
      const int64_t next = m.work.tile.read().first + G::kTokens;
      const bool done = next >= m.work.tile.read().direction.length;
      __syncthreads();
      if (done) break;
      if (threadIdx.x == 0) m.work.tile.write().move_to(next, G::kTokens);
      __syncthreads();
    }
    if (threadIdx.x == 0) m.work.next_direction(s);
    __syncthreads();
  }
}

template <class F, int kLanes>
cudaError_t run(const SelectiveScan& s, cudaStream_t stream) {
  using G = ForwardGeometry<F, kLanes>;
  return launch(selective_scan_forward<G>, block_count<G>(s), G::kThreads, stream, s);
}

}  // namespace

int selective_scan_lanes(const SelectiveScan& s, int multiprocessors) {
  const bool long_rows = s.order.max_length() >= 4 * kTile;
  return !s.is_double && long_rows && block_count<ForwardGeometry<float, 8>>(s) < 2 * multiprocessors ? 32 : 8;
}

cudaError_t selective_scan(const SelectiveScan& s, int lanes, cudaStream_t stream) {
  if (s.is_double) return run<double, 8>(s, stream);
  return lanes == 32 ? run<float, 32>(s, stream) : run<float, 8>(s, stream);
}

}  // namespace iumad::cuda
