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

template <class F>
struct ForwardScratch {
  static constexpr int V = kLanes<F>;
  Scratch memory;
  F *u, *dt, *dtu, *y;    // [token][lane]
  F *A, *B, *C, *h;       // [state][lane]; A times log2(e)
  int64_t* state_offset;  // 0, 1, 2, ...

  explicit ForwardScratch(int64_t states)
      : memory(4 * Scratch::bytes<F>(kTile * V) + 4 * Scratch::bytes<F>(states * V) + Scratch::bytes<int64_t>(states)) {
    for (F** p : {&u, &dt, &dtu, &y}) *p = memory.take<F>(kTile * V);
    for (F** p : {&A, &B, &C, &h}) *p = memory.take<F>(states * V);
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

template <class F, bool kConstantB, bool kConstantC>
void scan_direction(const SelectiveScan& s, int64_t k, const ChannelBlock& b, ForwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  const ScanDirection direction = s.order.direction(k);
  load_parameter<F>(m.A, s.A, s, k, b, m.state_offset);
  for (int64_t i = 0; i < s.states; ++i) store<F>(m.A + i * V, load(m.A + i * V) * broadcast(kLog2E<F>));
  if (kConstantB) load_parameter<F>(m.B, s.B.data, s, k, b, m.state_offset);
  if (kConstantC) load_parameter<F>(m.C, s.C.data, s, k, b, m.state_offset);

  int64_t offset[1];
  const StateView& h0 = s.initial_state;
  for (int64_t n = 0; n < s.states; ++n) {
    offset[0] = n * h0.state;
    if (h0.data) {
      void* data = at(h0.data, h0.dtype, b.batch * h0.batch + k * h0.direction + b.channel * h0.channel);
      load_block<F>(m.h + n * V, data, h0.dtype, offset, 1, h0.channel, b.lanes);
    } else {
      store<F>(m.h + n * V, Vec<F>{});
    }
  }

  const Vec<F> skip = load_channels<F>(s.D, s, k, b), bias = load_channels<F>(s.delta_bias, s, k, b);
  const auto load_inputs = [&](const TokenTile& tile) {
    load_tokens<F>(m.u, s.u, tile, k, b);
    load_delta<F>(m.dt, s, tile, k, b);
  };
  if (direction.length > 0) load_inputs(TokenTile(direction, 0));
  for (int64_t first = 0; first < direction.length; first += kTile) {
    const bool more = first + kTile < direction.length;
    const TokenTile tile(direction, first), next(direction, more ? first + kTile : first);
    if (s.tile_states) save_tile_states<F>(m.h, s, k, first / kTile, b);
    for (const TokenView* v : {&s.u, &s.delta}) prefetch_tokens<false>(*v, next, k, b);
    prefetch_tokens<false>(s.z, tile, k, b);
    prefetch_tokens<true>(s.out, tile, k, b);
    finish_delta<false, F>(m.dt, nullptr, s, tile.count, bias);
    for (int t = 0; t < tile.count; ++t) {
      const Vec<F> u = load(m.u + t * V);
      store<F>(m.dtu + t * V, load(m.dt + t * V) * u);
      store<F>(m.y + t * V, skip * u);
    }
    const auto B = coefficients<F, kConstantB>(s.B, m.B, tile, k, b);
    const auto C = coefficients<F, kConstantC>(s.C, m.C, tile, k, b);
    for_state_runs<kRun>(s.states, [&](auto run, int64_t n) {
      scan_tile<decltype(run)::value, F>(m.A, m.h, m.dt, m.dtu, m.y, tile.count, B, C, n);
    });
    if (s.z.data) {
      load_tokens<F>(m.u, s.z, tile, k, b);
      for (int t = 0; t < tile.count; ++t) {
        const Vec<F> z = load(m.u + t * V);
        store<F>(m.y + t * V, load(m.y + t * V) * z * sigmoid<F>(z));
      }
    }
    // Loads before stores: input and output lie at the same offsets within their pages, and a load that follows a store to the
    // same offset waits until that store has left for memory.
    if (more) load_inputs(next);
    store_tokens<F>(m.y, s.out, tile, k, b, k > 0 && s.order.overlaps());
  }

  const StateView& last = s.last_state;
  for (int64_t n = 0; n < s.states; ++n) {
    offset[0] = n * last.state;
    void* data = at(last.data, last.dtype, b.batch * last.batch + k * last.direction + b.channel * last.channel);
    store_block<F>(m.h + n * V, data, last.dtype, offset, 1, last.channel, b.lanes);
  }
}

template <class F>
int64_t forward_tasks(const SelectiveScan& s) {
  return s.batch * s.groups * blocks_per_group<F>(s);
}

template <class F>
void forward(const SelectiveScan& s, int64_t begin, int64_t end) {
  ForwardScratch<F> m(s.states);
  const auto run = s.B.constant ? (s.C.constant ? scan_direction<F, true, true> : scan_direction<F, true, false>)
                                : (s.C.constant ? scan_direction<F, false, true> : scan_direction<F, false, false>);
  const int64_t blocks = blocks_per_group<F>(s);
  for (int64_t task = begin; task < end; ++task) {
    const ChannelBlock b = channel_block<F>(s, task / blocks / s.groups, task / blocks % s.groups, task % blocks);
    for (int64_t k = 0; k < s.order.directions(); ++k) run(s, k, b, m);
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
