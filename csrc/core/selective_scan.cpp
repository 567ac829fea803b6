#include "selective_scan.h"

#include "selective_scan_tile.h"

namespace iumad::IUMAD_ISA {

// selective_scan_backward.cpp
int64_t selective_scan_backward_parts(const SelectiveScan&);
int64_t selective_scan_backward_tasks(const SelectiveScan&);
void selective_scan_backward(const SelectiveScan&, const SelectiveScanGradients&, int64_t begin, int64_t end);

namespace {

// States advanced together: enough independent chains to hide latency, few enough for the registers.
constexpr int kRun = kVectorBytes == 64 ? 16 : 4;

// Channel blocks that walk the tiles together: their rows lie next to each other in channels-last memory.
constexpr int64_t kMostBlocks = 4;
constexpr int64_t kTasksWanted = 32;

template <class F>
int64_t blocks_per_task(const SelectiveScan& s) {
  const int64_t blocks = s.batch * s.groups * blocks_per_group<F>(s) / kTasksWanted;
  return blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks;
}

template <class F>
struct ForwardScratch {
  static constexpr int V = kLanes<F>;
  Scratch memory;
  F *u, *dt, *dtu, *y;    // [token][lane]
  F *A, *B, *C, *h;       // [block][state][lane]; A times log2(e)
  int64_t* state_offset;  // 0, 1, 2, ...

  ForwardScratch(int64_t states, int64_t blocks)
      : memory(4 * Scratch::bytes<F>(kTile * V) + 4 * Scratch::bytes<F>(blocks * states * V) + Scratch::bytes<int64_t>(states)) {
    for (F** p : {&u, &dt, &dtu, &y}) *p = memory.take<F>(kTile * V);
    for (F** p : {&A, &B, &C, &h}) *p = memory.take<F>(blocks * states * V);
    state_offset = memory.take<int64_t>(states);
    for (int64_t n = 0; n < states; ++n) state_offset[n] = n;
  }
};

// Advances `kStates` states through the tokens of a tile and adds their share to y.
template <int kStates, class F, class BAt, class CAt>
inline void scan_tile(const F* A, F* h, const F* dt, const F* dtu, F* y, int count, const BAt& B, const CAt& C, int64_t first) {
  constexpr int V = kLanes<F>;
  Vec<F> state[kStates];
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) state[n] = load(h + (first + n) * V);
  for (int t = 0; t < count; ++t) {
    const Vec<F> step = load(dt + t * V), input = load(dtu + t * V);
    Vec<F> sum = load(y + t * V), sum_odd{};
    IUMAD_UNROLL for (int n = 0; n < kStates; ++n) {
      const Vec<F> decay = exp2_product<F>(step, load(A + (first + n) * V));
      state[n] = fma(decay, state[n], input * B(t, first + n));
      (n % 2 ? sum_odd : sum) = fma(state[n], C(t, first + n), n % 2 ? sum_odd : sum);
    }
    store<F>(y + t * V, sum + sum_odd);
  }
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) store<F>(h + (first + n) * V, state[n]);
}

// The parameters and the initial state of one channel block.
template <class F>
void load_block_state(const SelectiveScan& s, int64_t k, const ChannelBlock& b, int64_t index, ForwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  const int64_t at_block = index * s.states * V;
  load_parameter<F>(m.A + at_block, s.A, s, k, b, m.state_offset);
  for (int64_t n = 0; n < s.states; ++n) {
    F* a = m.A + at_block + n * V;
    store<F>(a, load(a) * broadcast(kLog2E<F>));
  }
  if (s.B.constant) load_parameter<F>(m.B + at_block, s.B.data, s, k, b, m.state_offset);
  if (s.C.constant) load_parameter<F>(m.C + at_block, s.C.data, s, k, b, m.state_offset);
  const StateView& v = s.initial_state;
  for (int64_t n = 0; n < s.states; ++n) {
    F* h = m.h + at_block + n * V;
    if (v.data) {
      const int64_t offset = n * v.state;
      void* data = at(v.data, v.dtype, b.batch * v.batch + k * v.direction + b.channel * v.channel);
      load_block<F>(h, data, v.dtype, &offset, 1, v.channel, b.lanes);
    } else {
      store<F>(h, Vec<F>{});
    }
  }
}

template <class F>
void store_last_state(const SelectiveScan& s, int64_t k, const ChannelBlock& b, const F* h) {
  const StateView& v = s.last_state;
  void* data = at(v.data, v.dtype, b.batch * v.batch + k * v.direction + b.channel * v.channel);
  for (int64_t n = 0; n < s.states; ++n) {
    const int64_t offset = n * v.state;
    store_block<F>(h + n * kLanes<F>, data, v.dtype, &offset, 1, v.channel, b.lanes);
  }
}

// One tile of one channel block, whose u and delta are in m.u and m.dt; leaves the output in m.y.
template <class F, bool kConstantB, bool kConstantC>
void scan_block(const SelectiveScan& s, int64_t k, const TokenTile& tile, const ChannelBlock& b, int64_t index,
                ForwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  const int64_t at_block = index * s.states * V;
  const Vec<F> skip = load_channels<F>(s.D, s, k, b);
  finish_delta<false, F>(m.dt, nullptr, s, tile.count, load_channels<F>(s.delta_bias, s, k, b));
  for (int t = 0; t < tile.count; ++t) {
    const Vec<F> u = load(m.u + t * V);
    store<F>(m.dtu + t * V, load(m.dt + t * V) * u);
    store<F>(m.y + t * V, skip * u);
  }
  const auto B = coefficients<F, kConstantB>(s.B, m.B + at_block, tile, k, b);
  const auto C = coefficients<F, kConstantC>(s.C, m.C + at_block, tile, k, b);
  for_state_runs<kRun>(s.states, [&](auto run, int64_t n) {
    scan_tile<decltype(run)::value, F>(m.A + at_block, m.h + at_block, m.dt, m.dtu, m.y, tile.count, B, C, n);
  });
  if (s.z.data) {
    load_tokens<F>(m.u, s.z, tile, k, b);
    for (int t = 0; t < tile.count; ++t) {
      const Vec<F> z = load(m.u + t * V);
      store<F>(m.y + t * V, load(m.y + t * V) * z * sigmoid<F>(z));
    }
  }
}

// One direction for `blocks` neighbouring channel blocks of a group.
template <class F, bool kConstantB, bool kConstantC>
void scan_direction(const SelectiveScan& s, int64_t k, int64_t batch, int64_t group, int64_t first_block, int64_t blocks,
                    ForwardScratch<F>& m) {
  const ScanDirection direction = s.order.direction(k);
  const auto block = [&](int64_t i) { return channel_block<F>(s, batch, group, first_block + i); };
  const auto load_inputs = [&](const TokenTile& tile, const ChannelBlock& b) {
    load_tokens<F>(m.u, s.u, tile, k, b);
    load_delta<F>(m.dt, s, tile, k, b);
  };
  for (int64_t i = 0; i < blocks; ++i) load_block_state<F>(s, k, block(i), i, m);
  if (direction.length > 0) load_inputs(TokenTile(direction, 0), block(0));
  for (int64_t first = 0; first < direction.length; first += kTile) {
    const bool more = first + kTile < direction.length;
    const TokenTile tile(direction, first), next(direction, more ? first + kTile : first);
    for (int64_t i = 0; i < blocks; ++i) {
      const ChannelBlock b = block(i);
      for (const TokenView* v : {&s.u, &s.delta}) prefetch_tokens<false>(*v, next, k, b);
      prefetch_tokens<false>(s.z, tile, k, b);
      prefetch_tokens<true>(s.out, tile, k, b);
      if (s.tile_states) save_tile_states<F>(m.h + i * s.states * kLanes<F>, s, k, first / kTile, b);
      scan_block<F, kConstantB, kConstantC>(s, k, tile, b, i, m);
      // Loads before stores: input and output lie at the same offsets within their pages, and a load that follows a store to the
      // same offset waits until that store has left for memory.
      if (i + 1 < blocks) {
        load_inputs(tile, block(i + 1));
      } else if (more) {
        load_inputs(next, block(0));
      }
      store_tokens<F>(m.y, s.out, tile, k, b, k > 0 && s.order.overlaps());
    }
  }
  for (int64_t i = 0; i < blocks; ++i) store_last_state<F>(s, k, block(i), m.h + i * s.states * kLanes<F>);
}

template <class F>
int64_t tasks_per_group(const SelectiveScan& s) {
  const int64_t per_task = blocks_per_task<F>(s);
  return (blocks_per_group<F>(s) + per_task - 1) / per_task;
}

template <class F>
int64_t forward_tasks(const SelectiveScan& s) {
  return s.batch * s.groups * tasks_per_group<F>(s);
}

template <class F>
void forward(const SelectiveScan& s, int64_t begin, int64_t end) {
  const int64_t per_task = blocks_per_task<F>(s), count = tasks_per_group<F>(s), group_blocks = blocks_per_group<F>(s);
  ForwardScratch<F> m(s.states, per_task);
  const auto run = s.B.constant ? (s.C.constant ? scan_direction<F, true, true> : scan_direction<F, true, false>)
                                : (s.C.constant ? scan_direction<F, false, true> : scan_direction<F, false, false>);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % count * per_task, group = task / count % s.groups, batch = task / count / s.groups;
    const int64_t left = group_blocks - first;
    for (int64_t k = 0; k < s.order.directions(); ++k) run(s, k, batch, group, first, left < per_task ? left : per_task, m);
  }
}

int64_t forward_tasks_any(const SelectiveScan& s) { return s.is_double ? forward_tasks<double>(s) : forward_tasks<float>(s); }

void forward_any(const SelectiveScan& s, int64_t begin, int64_t end) {
  s.is_double ? forward<double>(s, begin, end) : forward<float>(s, begin, end);
}

float exponentials(int64_t count) {
  constexpr int V = kLanes<float>;
  alignas(64) float step[kTile * V], A[kRun * V];
  for (int i = 0; i < kTile * V; ++i) step[i] = 0.01f * float(i);
  for (int i = 0; i < kRun * V; ++i) A[i] = -0.1f * float(i);
  Vec<float> sum{};
  for (int64_t i = 0; i < count / (kRun * V); ++i) {
    const Vec<float> x = load(step + i % kTile * V);
    IUMAD_UNROLL for (int n = 0; n < kRun; ++n) sum += exp2_product<float>(x, load(A + n * V));
  }
  return sum_lanes<float>(sum);
}

}  // namespace

extern const SelectiveScanKernels selective_scan;
const SelectiveScanKernels selective_scan = {
    forward_tasks_any,       forward_any, selective_scan_backward_parts, selective_scan_backward_tasks,
    selective_scan_backward, exponentials};

}  // namespace iumad::IUMAD_ISA
