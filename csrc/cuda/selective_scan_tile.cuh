// What forward and backward of the selective scan share: how a thread block is laid out over channels and tokens, how tiles move
// between global and shared memory, and the scan over the lanes of a channel.
//
// A block owns kChannels neighbouring channels of one batch entry and walks a direction tile by tile. kLanes neighbouring threads
// share a channel; each owns kItems consecutive tokens of the tile in registers. Tiles pass through shared memory, so that global
// memory is read and written 16 bytes at a time along whichever dimension is contiguous: tokens (length-last) or channels
// (channels-last).
#pragma once

#include <type_traits>

#include "element.cuh"
#include "selective_scan.h"
#include "shared_array.cuh"

namespace iumad::cuda {

// threadIdx.x, read anew: what follows from it is not kept in registers from one loop over a tile to the next.
__device__ inline int thread_index() {
#if defined(IUMAD_CUDA_EMULATION)
  return threadIdx.x;
#else
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
#endif
}

template <class Float, int kLanesPerChannel, int kThreadsPerBlock, int kStatesPerGroup>
struct Geometry {
  using F = Float;
  static constexpr int kLanes = kLanesPerChannel;
  static constexpr int kGroup = kStatesPerGroup;  // states whose coefficients are in shared memory at a time
  static constexpr int kItems = 8;
  static constexpr int kThreads = kThreadsPerBlock;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kChannels = kThreads / kLanes;
  static constexpr int kTokens = kLanes * kItems;
  static_assert(kTokens % kTile == 0);

  // Rows of tokens in shared memory: 16 bytes between the lanes' tokens spread the lanes' 16-byte accesses over all banks.
  static constexpr int kPad = 16 / sizeof(F);
  static constexpr int kPitch = kLanes * (kItems + kPad) + kPad;
  __device__ static int position(int token) { return token + token / kItems * kPad; }

  using Row = SharedArray<F, kGroup * kPitch>;
  using PerChannel = SharedArray<F, kGroup * kChannels>;  // [state][channel]
};

// The channels of a block, and the directions it scans one after the other: all of them where they add up at the same pixels.
struct ChannelBlock {
  int64_t batch, group, part, channel;  // channel: the first
  int channels;
  int64_t k_begin, k_end;
};

template <class G>
__host__ __device__ inline int64_t parts_per_group(const SelectiveScan& s) {
  return (s.dim / s.groups + G::kChannels - 1) / G::kChannels;
}

template <class G>
__host__ __device__ inline int64_t block_count(const SelectiveScan& s) {
  return s.batch * (s.order.overlaps() ? 1 : s.order.directions()) * s.groups * parts_per_group<G>(s);
}

template <class G>
__device__ ChannelBlock channel_block(const SelectiveScan& s, int64_t block) {
  const int64_t parts = parts_per_group<G>(s), size = s.dim / s.groups;
  ChannelBlock b;
  b.part = block % parts;
  block /= parts;
  b.group = block % s.groups;
  block /= s.groups;
  if (s.order.overlaps()) {
    b.k_begin = 0;
    b.k_end = s.order.directions();
    b.batch = block;
  } else {
    b.k_begin = block % s.order.directions();
    b.k_end = b.k_begin + 1;
    b.batch = block / s.order.directions();
  }
  const int64_t first = b.part * G::kChannels, left = size - first;
  b.channel = b.group * size + first;
  b.channels = int(left < G::kChannels ? left : G::kChannels);
  return b;
}

// A tile of a direction: `count` tokens from `first` on.
struct Tile {
  ScanDirection direction;
  int64_t k, first;
  int count;

  __device__ void move_to(int64_t token, int tokens) {
    const int64_t left = direction.length - token;
    first = token;
    count = int(left < tokens ? left : tokens);
  }
};

// What all threads of a block know about their work: a direction of a block of channels, and a tile of it. It lives in shared
// memory, where it costs no registers: thread 0 writes it between two barriers.
template <class G, bool kFromEnd>
struct Work {
  SharedObject<int64_t> number;  // of the block of channels; -1: no more work
  SharedObject<ChannelBlock> block;
  SharedObject<Tile> tile;

  // The grid is at most as large as the number of blocks: there is a first one for everybody.
  __device__ void start(const SelectiveScan& s) { start_block(s, blockIdx.x); }

  __device__ void next_direction(const SelectiveScan& s) {
    if (tile.read().k + 1 < block.read().k_end) return start_direction(s, tile.read().k + 1);
    const int64_t next = number.read() + gridDim.x;
    if (next < block_count<G>(s)) return start_block(s, next);
    number.write() = -1;
  }

 private:
  __device__ void start_block(const SelectiveScan& s, int64_t i) {
    number.write() = i;
    block.write() = channel_block<G>(s, i);
    start_direction(s, block.read().k_begin);
  }
  __device__ void start_direction(const SelectiveScan& s, int64_t k) {
    Tile& t = tile.write();
    t.direction = s.order.direction(k);
    t.k = k;
    t.move_to(kFromEnd && t.direction.length > 0 ? (t.direction.length - 1) / G::kTokens * G::kTokens : 0, G::kTokens);
  }
};

template <class G>
struct Pixels {
  SharedArray<int64_t, G::kTokens> row, column;

  __device__ void locate(const Tile& tile) {
    for (int t = thread_index(); t < G::kTokens; t += G::kThreads) {
      int64_t r = 0, c = 0;
      if (t < tile.count) tile.direction.pixel(tile.first + t, &r, &c);
      row.put(t, r);
      column.put(t, c);
    }
  }
  __device__ int64_t offset(const TokenView& v, int t) const { return row[t] * v.row + column[t] * v.column; }
};

enum class Move { kLoad, kStore, kAccumulate };

// Moves up to one vector of elements, n of them real, between memory and shared memory: element j lives at address(j) and at
// tile[slot(j)]. `vector` is where all of them lie side by side (backwards where `reversed`), or null. Slots past n read 0.
template <Move kMove, class T, class Shared, class Address, class Slot>
__device__ inline void move_vector(Shared& tile, int n, T* vector, bool reversed, Address&& address, Slot&& slot) {
  using F = decltype(tile[0]);
  constexpr int V = Vector<T>::kItems;
  if (kMove != Move::kAccumulate && n == V && vector && aligned(vector)) {
    Vector<T> v;
    if constexpr (kMove == Move::kLoad) v = *reinterpret_cast<const Vector<T>*>(vector);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int at = slot(reversed ? V - 1 - j : j);
      if constexpr (kMove == Move::kLoad) {
        tile.put(at, to_compute(v.item[j]));
      } else {
        from_compute(tile[at], &v.item[j]);
      }
    }
    if constexpr (kMove == Move::kStore) *reinterpret_cast<Vector<T>*>(vector) = v;
    return;
  }
#pragma unroll 4
  for (int j = 0; j < V; ++j) {
    if constexpr (kMove == Move::kLoad) {
      tile.put(slot(j), j < n ? F(to_compute(*address(j))) : F(0));
    } else if (j < n) {
      T* p = address(j);
      from_compute(kMove == Move::kAccumulate ? F(to_compute(*p)) + tile[slot(j)] : tile[slot(j)], p);
    }
  }
}

// A whole tile [channel][token]. `rows` of the view are shared by the channels (delta); it divides dim.
template <class G, Move kMove, class T, class Shared>
__device__ void move_tile(Shared& shared, int base, const SelectiveScan& s, const TokenView& view, int64_t rows,
                          const Pixels<G>& pixels, const Tile& tile, const ChannelBlock& b) {
  constexpr int V = Vector<T>::kItems;
  T* data = static_cast<T*>(view.data) + b.batch * view.batch + tile.k * view.direction;
  const auto at = [&](int c, int t) { return base + c * G::kPitch + G::position(t); };
  const auto real = [](int count, int first) { return count - first < 0 ? 0 : count - first < V ? count - first : V; };
  if (G::kChannels % V == 0 && view.channel == 1 && rows == s.dim) {
    constexpr int kVectors = G::kChannels % V == 0 ? G::kChannels / V : 1;
    for (int i = thread_index(); i < G::kTokens * kVectors; i += G::kThreads) {
      const int t = i / kVectors, c = i % kVectors * V;
      const bool inside = t < tile.count && c < b.channels;
      T* p = inside ? data + b.channel + c + pixels.offset(view, t) : nullptr;
      move_vector<kMove>(
          shared, inside ? real(b.channels, c) : 0, p, false, [&](int j) { return p + j; }, [&](int j) { return at(c + j, t); });
    }
    return;
  }
  constexpr int kVectors = G::kTokens / V;
  const int64_t unit = tile.direction.inner_row * view.row + tile.direction.inner_column * view.column;
  for (int i = thread_index(); i < G::kChannels * kVectors; i += G::kThreads) {
    const int c = i / kVectors, t = i % kVectors * V;
    const bool inside = c < b.channels && t < tile.count;
    const int n = inside ? real(tile.count, t) : 0;
    const int64_t channel = rows == s.dim ? b.channel + c : (b.channel + c) * rows / s.dim;
    T* row = inside ? data + channel * view.channel : nullptr;
    // The first and the last token V - 1 units apart: so is every token between them, also across the end of an inner loop.
    T* vector = nullptr;
    if (n == V && (unit == 1 || unit == -1)) {
      T* p = row + pixels.offset(view, t);
      if (row + pixels.offset(view, t + V - 1) - p == (V - 1) * unit) vector = unit == 1 ? p : p - (V - 1);
    }
    move_vector<kMove>(
        shared, n, vector, unit == -1, [&](int j) { return row + pixels.offset(view, t + j); },
        [&](int j) { return at(c, t + j); });
  }
}

template <class G, class Shared>
__device__ void load_tile(Shared& shared, int base, const SelectiveScan& s, const TokenView& view, int64_t rows,
                          const Pixels<G>& pixels, const Tile& tile, const ChannelBlock& b) {
  visit<typename G::F>(view.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    move_tile<G, Move::kLoad, T>(shared, base, s, view, rows, pixels, tile, b);
  });
}

// With `accumulate` (an earlier direction has written these pixels) the result is in the compute type.
template <class G, class Shared>
__device__ void store_tile(Shared& shared, int base, const SelectiveScan& s, const TokenView& view, bool accumulate,
                           const Pixels<G>& pixels, const Tile& tile, const ChannelBlock& b) {
  using F = typename G::F;
  if (accumulate) return move_tile<G, Move::kAccumulate, F>(shared, base, s, view, s.dim, pixels, tile, b);
  visit<F>(view.dtype, [&](auto* null) {
    using T = std::remove_pointer_t<decltype(null)>;
    move_tile<G, Move::kStore, T>(shared, base, s, view, s.dim, pixels, tile, b);
  });
}

// A (channel, state) array of which `data` is the first channel's row, as [state][channel]; zeros for absent channels and states.
template <class G>
__device__ void load_per_channel(typename G::PerChannel& out, const typename G::F* data, const SelectiveScan& s, int64_t n0,
                                 int states, const ChannelBlock& b) {
  for (int i = thread_index(); i < G::kGroup * G::kChannels; i += G::kThreads) {
    const int c = i / G::kGroup, n = i % G::kGroup;
    out.put(n * G::kChannels + c, data && c < b.channels && n < states ? data[c * s.states + n0 + n] : 0);
  }
}
template <class G>
__device__ void store_per_channel(const typename G::PerChannel& in, typename G::F* data, bool accumulate, const SelectiveScan& s,
                                  int64_t n0, int states, const ChannelBlock& b) {
  for (int i = thread_index(); i < G::kGroup * G::kChannels; i += G::kThreads) {
    const int c = i / G::kGroup, n = i % G::kGroup;
    if (c >= b.channels || n >= states) continue;
    typename G::F* p = data + c * s.states + n0 + n;
    *p = accumulate ? *p + in[n * G::kChannels + c] : in[n * G::kChannels + c];
  }
}

// B or C of the states [n0, n0 + states): [state][token] where it varies, [state][channel] where it is constant.
template <class G>
__device__ void load_projection(typename G::Row& row, typename G::PerChannel& constant, const SelectiveScan& s,
                                const ProjectionView& v, int64_t n0, int states, const Pixels<G>& pixels, const Tile& tile,
                                const ChannelBlock& b) {
  using F = typename G::F;
  if (v.constant) {
    load_per_channel<G>(constant, static_cast<const F*>(v.data) + (tile.k * s.dim + b.channel) * s.states, s, n0, states, b);
    return;
  }
  constexpr int V = Vector<F>::kItems < G::kGroup ? Vector<F>::kItems : G::kGroup, kVectors = G::kGroup / V;
  const F* data = static_cast<const F*>(v.data) + b.batch * v.batch + tile.k * v.direction + b.group * v.group + n0;
  for (int i = thread_index(); i < G::kTokens * kVectors; i += G::kThreads) {
    const int t = i / kVectors, n = i % kVectors * V;
    const bool inside = t < tile.count && n < states;
    const F* p = inside ? data + n + pixels.row[t] * v.row + pixels.column[t] * v.column : nullptr;
    const auto at = [&](int j) { return (n + j) * G::kPitch + G::position(t); };
    if (inside && V == Vector<F>::kItems && n + V <= states && aligned(p)) {
      const Vector<F> x = *reinterpret_cast<const Vector<F>*>(p);
#pragma unroll
      for (int j = 0; j < V; ++j) row.put(at(j), x.item[j]);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) row.put(at(j), inside && n + j < states ? p[j] : F(0));
    }
  }
}

// [state][channel] of a state tensor of any dtype and strides.
template <class G>
__device__ void load_state(typename G::PerChannel& out, const StateView& v, const SelectiveScan& s, int64_t k, int64_t n0,
                           int states, const ChannelBlock& b) {
  if (v.data == nullptr) return load_per_channel<G>(out, nullptr, s, n0, states, b);
  visit<typename G::F>(v.dtype, [&](auto* null) {
    const auto* data = static_cast<decltype(null)>(v.data) + b.batch * v.batch + k * v.direction;
    for (int i = thread_index(); i < G::kGroup * G::kChannels; i += G::kThreads) {
      const int c = i / G::kGroup, n = i % G::kGroup;
      const bool real = c < b.channels && n < states;
      out.put(n * G::kChannels + c, real ? to_compute(data[(b.channel + c) * v.channel + (n0 + n) * v.state]) : 0);
    }
  });
}
template <class G>
__device__ void store_state(const typename G::PerChannel& in, const StateView& v, int64_t k, int64_t n0, int states,
                            const ChannelBlock& b) {
  visit<typename G::F>(v.dtype, [&](auto* null) {
    auto* data = static_cast<decltype(null)>(v.data) + b.batch * v.batch + k * v.direction;
    for (int i = thread_index(); i < G::kGroup * G::kChannels; i += G::kThreads) {
      const int c = i / G::kGroup, n = i % G::kGroup;
      if (c >= b.channels || n >= states) continue;
      from_compute(in[n * G::kChannels + c], data + (b.channel + c) * v.channel + (n0 + n) * v.state);
    }
  });
}

// One thread's view of the recurrence of one state: its channel, and its kItems tokens of the tile.
template <class G>
struct Items {
  using F = typename G::F;
  int channel = thread_index() / G::kLanes, lane = thread_index() % G::kLanes;
  int first = lane * G::kItems;  // token of the tile

  __device__ int at() const { return channel * G::kPitch + G::position(first); }  // in a tile
  __device__ int at(int n) const { return n * G::kPitch + G::position(first); }   // in a projection's rows

  // B or C of state n at this thread's tokens.
  __device__ void coefficients(F (&out)[G::kItems], const typename G::Row& row, const typename G::PerChannel& constant,
                               const ProjectionView& v, int n) const {
    if (v.constant) {
      const F value = constant[n * G::kChannels + channel];
#pragma unroll
      for (int i = 0; i < G::kItems; ++i) out[i] = value;
    } else {
      row.load(at(n), out);
    }
  }

  // dt from delta; 0 past the end of the direction, where it makes every decay 1 and every input 0.
  __device__ void finish_delta(F (&dt)[G::kItems], const SelectiveScan& s, const Tile& tile, const ChannelBlock& b) const {
    const int64_t c = tile.k * s.dim + b.channel + channel;
    const F bias = s.delta_bias && channel < b.channels ? static_cast<const F*>(s.delta_bias)[c] : F(0);
#pragma unroll
    for (int i = 0; i < G::kItems; ++i) {
      F x = dt[i] + bias;
      if (s.delta_softplus) x = softplus(x);
      dt[i] = first + i < tile.count ? x : F(0);
    }
  }

  __device__ F skip(const SelectiveScan& s, const Tile& tile, const ChannelBlock& b) const {
    const int64_t c = tile.k * s.dim + b.channel + channel;
    return s.D && channel < b.channels ? static_cast<const F*>(s.D)[c] : F(0);
  }
};

// The exponent's coefficient A log2(e), finite: 0 * A is then 0 also past the end of the direction.
template <class F>
__device__ inline F scaled_decay(F A) {
  constexpr F kLargest = sizeof(F) == 8 ? F(1.7e308) : F(3.4e38f);
  const F a = A * kLog2E<F>;
  return a < -kLargest ? -kLargest : a > kLargest ? kLargest : a;  // NaN stays NaN
}

// decay and input of one state at this thread's tokens, and the state before the first of them: a scan of the pairs
// (decay, input) over the lanes of the channel, the first of which starts from `start`. Returns the state before this thread's
// tokens; *end is the state after the tile, in the last lane.
template <class G, class F>
__device__ inline F scan_state(const F (&decay)[G::kItems], const F (&input)[G::kItems], F start, int lane, F* product, F* end) {
  F h = lane == 0 ? start : F(0), p = 1;
#pragma unroll
  for (int i = 0; i < G::kItems; ++i) {
    h = decay[i] * h + input[i];
    p *= decay[i];
  }
  *product = p;
#pragma unroll
  for (int distance = 1; distance < G::kLanes; distance *= 2) {
    const F h_before = __shfl_up_sync(kWholeWarp, h, distance, G::kLanes);
    const F p_before = __shfl_up_sync(kWholeWarp, p, distance, G::kLanes);
    if (lane >= distance) {
      h = p * h_before + h;
      p *= p_before;
    }
  }
  *end = h;
  const F before = __shfl_up_sync(kWholeWarp, h, 1, G::kLanes);
  return lane == 0 ? start : before;
}

}  // namespace iumad::cuda
