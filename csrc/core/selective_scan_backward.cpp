#include "selective_scan_tile.h"

namespace iumad::IUMAD_ISA {
namespace {

// States walked backward together: their states, decays and partial sums of one tile must stay in the first-level cache.
constexpr int kRun = kVectorBytes == 64 ? 8 : 4;
constexpr int64_t kMostBlocks = 8;  // channel blocks whose dB and dC are added up before lanes are summed
constexpr int64_t kTasksWanted = 32;

template <class F>
int64_t blocks_per_part(const SelectiveScan& s) {
  const int64_t blocks = s.batch * s.groups * blocks_per_group<F>(s) / kTasksWanted;
  return blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks;
}

template <class F>
int64_t parts(const SelectiveScan& s) {
  const int64_t per_part = blocks_per_part<F>(s);
  return (blocks_per_group<F>(s) + per_part - 1) / per_part;
}

template <class F>
struct BackwardScratch {
  static constexpr int V = kLanes<F>;
  Scratch memory;
  F *u, *dt, *slope, *dtu, *dout, *z, *y, *dy, *sA, *sB;  // [token][lane]
  F *A, *B, *C, *g, *dA, *dBc, *dCc;                      // [block][state][lane]; A times log2(e)
  F *dD, *dbias, *largest_A;                              // [block][lane]
  F *h, *decay;                                           // [token (+ 1)][state of the run][lane]
  F *dB, *dC;                                             // [token][state][lane]
  F *B_rows, *C_rows;                                     // [token][state], where they are not read in place
  int64_t* state_offset;

  BackwardScratch(int64_t states, int64_t blocks)
      : memory(10 * Scratch::bytes<F>(kTile * V) + 7 * Scratch::bytes<F>(blocks * states * V) +
               3 * Scratch::bytes<F>(blocks * V) + 2 * Scratch::bytes<F>((kTile + 1) * kRun * V) +
               2 * Scratch::bytes<F>(kTile * states * V) + 2 * Scratch::bytes<F>(kTile * states) +
               Scratch::bytes<int64_t>(states)) {
    for (F** p : {&u, &dt, &slope, &dtu, &dout, &z, &y, &dy, &sA, &sB}) *p = memory.take<F>(kTile * V);
    for (F** p : {&A, &B, &C, &g, &dA, &dBc, &dCc}) *p = memory.take<F>(blocks * states * V);
    for (F** p : {&dD, &dbias, &largest_A}) *p = memory.take<F>(blocks * V);
    for (F** p : {&h, &decay}) *p = memory.take<F>((kTile + 1) * kRun * V);
    for (F** p : {&dB, &dC}) *p = memory.take<F>(kTile * states * V);
    for (F** p : {&B_rows, &C_rows}) *p = memory.take<F>(kTile * states);
    state_offset = memory.take<int64_t>(states);
    for (int64_t n = 0; n < states; ++n) state_offset[n] = n;
  }
};

template <class F>
void clear(F* p, int64_t n) {
  std::memset(p, 0, n * sizeof(F));
}

// Zeroes the lanes from `first` on of `rows` vectors.
template <class F>
void clear_lanes(F* p, int64_t rows, int first) {
  for (int64_t i = 0; i < rows; ++i) clear(p + i * kLanes<F> + first, kLanes<F> - first);
}

// Recomputes the states of a run through a tile from the saved state (m.h[0]); adds to y where the gate needs it.
template <int kStates, Decays decays, bool kNeedY, class F, class BAt, class CAt>
inline void recompute(BackwardScratch<F>& m, const F* A, int count, const BAt& B, const CAt& C, int64_t first) {
  // So many decays before their states: one's arithmetic is a single long chain.
  constexpr int V = kLanes<F>, kTogether = kVectorBytes == 64 || kStates == 1 ? kStates : 2;
  A += first * V;
  Vec<F> state[kStates];
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) state[n] = load(m.h + n * V);
  for (int t = 0; t < count; ++t) {
    const F *b = B.from(t, first), *c = C.from(t, first);
    const Vec<F> step = load(m.dt + t * V), input = load(m.dtu + t * V);
    Vec<F> y = kNeedY ? load(m.y + t * V) : Vec<F>{};
    IUMAD_UNROLL for (int n = 0; n < kStates; n += kTogether) {
      Vec<F> kept[kTogether];
      IUMAD_UNROLL for (int i = 0; i < kTogether; ++i) kept[i] = decay<decays, F>(step, load(A + (n + i) * V));
      IUMAD_UNROLL for (int i = 0; i < kTogether; ++i) {
        state[n + i] = fma(kept[i], state[n + i], input * B.value(b, n + i));
        store<F>(m.decay + (t * kStates + n + i) * V, kept[i]);
        store<F>(m.h + ((t + 1) * kStates + n + i) * V, state[n + i]);
        if constexpr (kNeedY) y = fma(state[n + i], C.value(c, n + i), y);
      }
    }
    if constexpr (kNeedY) store<F>(m.y + t * V, y);
  }
}

// The adjoint of `recompute`: walks the tile backward with the state gradients g in registers.
template <int kStates, bool kConstantB, bool kConstantC, class F, class BAt, class CAt>
inline void adjoint(BackwardScratch<F>& m, const F* A, F* g, F* dA, F* dBc, F* dCc, int64_t states, int count, const BAt& B,
                    const CAt& C, int64_t first) {
  constexpr int V = kLanes<F>;
  A += first * V, g += first * V, dA += first * V, dBc += first * V, dCc += first * V;
  Vec<F> gradient[kStates], sum_dA[kStates];
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) {
    gradient[n] = load(g + n * V);
    sum_dA[n] = load(dA + n * V);
  }
  for (int t = count - 1; t >= 0; --t) {
    const Vec<F> step = load(m.dt + t * V), input = load(m.dtu + t * V), dy = load(m.dy + t * V);
    const F *b = B.from(t, first), *c = C.from(t, first);
    F *tile_dB = m.dB + (t * states + first) * V, *tile_dC = m.dC + (t * states + first) * V;
    Vec<F> sA = load(m.sA + t * V), sB = load(m.sB + t * V);
    IUMAD_UNROLL for (int n = 0; n < kStates; ++n) {
      const Vec<F> before = load(m.h + (t * kStates + n) * V), after = load(m.h + ((t + 1) * kStates + n) * V);
      F *dC = (kConstantC ? dCc : tile_dC) + n * V, *dB = (kConstantB ? dBc : tile_dB) + n * V;
      const Vec<F> gn = fma(dy, C.value(c, n), gradient[n]);
      store<F>(dC, fma(dy, after, load(dC)));
      store<F>(dB, fma(gn, input, load(dB)));
      sB = fma(gn, B.value(b, n), sB);
      gradient[n] = gn * load(m.decay + (t * kStates + n) * V);
      const Vec<F> q = gradient[n] * before;
      sum_dA[n] = fma(q, step, sum_dA[n]);
      sA = fma(q, load(A + n * V), sA);
    }
    store<F>(m.sA + t * V, sA);
    store<F>(m.sB + t * V, sB);
  }
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) {
    store<F>(g + n * V, gradient[n]);
    store<F>(dA + n * V, sum_dA[n]);
  }
}

// The tensors of one tile that have a value per token and channel.
struct BackwardTile {
  TokenTile tokens;
  TileView u, delta, z, grad_out, du, ddelta, dz;

  BackwardTile(const SelectiveScan& s, const SelectiveScanGradients& d, const TokenTile& tile, int64_t batch, int64_t k)
      : tokens(tile),
        u(s.u, tile, batch, k),
        delta(s.delta, tile, batch, k),
        z(s.z, tile, batch, k),
        grad_out(d.out, tile, batch, k),
        du(d.u, tile, batch, k),
        ddelta(d.delta, tile, batch, k),
        dz(d.z, tile, batch, k) {}

  __attribute__((always_inline)) void prefetch(const ChannelBlock& b) const {
    const auto all = [&](const auto& line) __attribute__((always_inline)) {
      for (int t = 0; t < kTile; ++t) line(t);
    };
    for (const TileView* v : {&u, &delta, &z, &grad_out, &du, &ddelta, &dz}) all(Prefetch(*v, b));
  }
};

// delta + bias, then softplus where asked, in place; and d(result) / d(delta). Returns the largest magnitudes of the result.
template <class F>
Vec<F> finish_delta(F* dt, F* slope, const SelectiveScan& s, int count, Vec<F> bias) {
  constexpr int V = kLanes<F>;
  for (int t = 0; t < count; ++t) {
    const Vec<F> x = load(dt + t * V) + bias;
    store<F>(dt + t * V, x);
    if (s.delta_softplus) store<F>(slope + t * V, exp<F, Range::kFinite>(minus_abs<F>(x)));
  }
  Vec<F> largest{};
  for (int t = 0; t < count; ++t) {
    const Vec<F> x = load(dt + t * V);
    const Softplus<F> y = s.delta_softplus ? softplus<F>(x, load(slope + t * V)) : Softplus<F>{x, broadcast(F(1))};
    store<F>(dt + t * V, y.value);
    store<F>(slope + t * V, y.derivative);
    largest = larger<F>(abs<F>(y.value), largest);
  }
  return largest;
}

// Reads a tile of one channel block and turns the gradient of the gated output into dy. Returns the largest magnitudes of dt.
template <class F>
Vec<F> load_tile(BackwardScratch<F>& m, const SelectiveScan& s, const BackwardTile& tile, int64_t k, const ChannelBlock& b,
                 Vec<F> skip) {
  constexpr int V = kLanes<F>;
  const int count = tile.tokens.count;
  load_tokens<F>(m.u, tile.u, b);
  load_delta<F>(m.dt, s, tile.delta, b);
  const Vec<F> largest = finish_delta<F>(m.dt, m.slope, s, count, load_channels<F>(s.delta_bias, s, k, b));
  load_tokens<F>(m.dout, tile.grad_out, b);
  if (s.z.data) load_tokens<F>(m.z, tile.z, b);
  for (int t = 0; t < count; ++t) {
    const Vec<F> u = load(m.u + t * V);
    store<F>(m.dtu + t * V, load(m.dt + t * V) * u);
    store<F>(m.y + t * V, skip * u);
    Vec<F> dy = load(m.dout + t * V);
    if (s.z.data) {
      const Vec<F> z = load(m.z + t * V);
      dy = dy * z * sigmoid<F>(z);
    }
    store<F>(m.dy + t * V, dy);
  }
  clear(m.sA, count * V);
  clear(m.sB, count * V);
  return largest;
}

// The tile's results once every state has added to sA and sB.
template <class F>
void store_tile(BackwardScratch<F>& m, const SelectiveScan& s, const SelectiveScanGradients& d, const BackwardTile& tile,
                int64_t k, const ChannelBlock& b, Vec<F> skip, F* dD, F* dbias) {
  constexpr int V = kLanes<F>;
  Vec<F> sum_dD = load(dD), sum_dbias = load(dbias);
  for (int t = 0; t < tile.tokens.count; ++t) {
    const Vec<F> u = load(m.u + t * V), dy = load(m.dy + t * V), sB = load(m.sB + t * V);
    const Vec<F> ddt = fma(u, sB, load(m.sA + t * V) * broadcast(kLn2<F>));
    const Vec<F> ddelta = ddt * load(m.slope + t * V);
    sum_dD = fma(dy, u, sum_dD);
    sum_dbias += ddelta;
    store<F>(m.sA + t * V, ddelta);
    store<F>(m.sB + t * V, fma(load(m.dt + t * V), sB, skip * dy));
    if (s.z.data) {
      const Vec<F> z = load(m.z + t * V), gate = sigmoid<F>(z), one = broadcast(F(1));
      store<F>(m.z + t * V, load(m.dout + t * V) * load(m.y + t * V) * gate * fma(z, one - gate, one));
    }
  }
  store<F>(dD, sum_dD);
  store<F>(dbias, sum_dbias);
  const bool again = k > 0 && s.order.overlaps();  // an earlier direction has written these pixels
  store_tokens<F>(m.sB, tile.du, b, again);
  store_tokens<F>(m.sA, tile.ddelta, b, again && d.delta.direction == 0);
  if (s.z.data) store_tokens<F>(m.z, tile.dz, b, again);
}

// Sums the lanes of a tile's [token][state][lane] block into the rows of the partial gradient.
template <class F>
void store_projection(const F* sums, void* partial, int64_t directions, const SelectiveScan& s, const TokenTile& tile,
                      int64_t part, int64_t k, const ChannelBlock& b) {
  constexpr int V = kLanes<F>;
  const int64_t pixels = s.order.rows * s.order.columns;
  const bool again = directions == 1 && k > 0 && s.order.overlaps();
  F* base = static_cast<F*>(partial) +
            (((part * s.batch + b.batch) * directions + (directions == 1 ? 0 : k)) * s.groups + b.group) * pixels * s.states;
  for (int t = 0; t < tile.count; ++t) {
    F* row = base + (tile.row[t] * s.order.columns + tile.column[t]) * s.states;
    const F* sum = sums + t * s.states * V;
    int64_t n = 0;
    for (; n + V <= s.states; n += V) {
      Vec<F> lanes[V];
      IUMAD_UNROLL for (int i = 0; i < V; ++i) lanes[i] = load(sum + (n + i) * V);
      const Vec<F> total = sum_rows<F>(lanes);
      store<F>(row + n, again ? load(row + n) + total : total);
    }
    for (; n < s.states; ++n) {
      const F total = sum_lanes<F>(load(sum + n * V));
      row[n] = again ? row[n] + total : total;
    }
  }
}

// Writes [state][lane] to a (batch, directions, dim, states) partial sum.
template <class F>
void store_parameter(const F* src, void* partial, const SelectiveScan& s, int64_t k, const ChannelBlock& b,
                     const int64_t* state_offset) {
  F* p = static_cast<F*>(partial) + ((b.batch * s.order.directions() + k) * s.dim + b.channel) * s.states;
  store_block<F>(src, p, kDTypeOf<F>, state_offset, s.states, s.states, b.lanes);
}

template <class F>
void store_channels(const F* src, void* partial, const SelectiveScan& s, int64_t k, const ChannelBlock& b) {
  if (partial == nullptr) return;
  F* p = static_cast<F*>(partial) + (b.batch * s.order.directions() + k) * s.dim + b.channel;
  std::memcpy(p, src, b.lanes * sizeof(F));
}

// One direction for the channel blocks [first_block, first_block + blocks) of a group, tiles from the last to the first.
template <class F, bool kConstantB, bool kConstantC>
void backward_direction(const SelectiveScan& s, const SelectiveScanGradients& d, int64_t k, int64_t part, int64_t first_block,
                        int64_t blocks, int64_t batch, int64_t group, BackwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  constexpr bool kCommon = !kConstantB && !kConstantC;
  const ScanDirection direction = s.order.direction(k);
  const int64_t block_size = s.states * V;
  clear(m.dA, blocks * block_size);
  clear(m.dBc, blocks * block_size);
  clear(m.dCc, blocks * block_size);
  clear(m.g, blocks * block_size);
  clear(m.dD, blocks * V);
  clear(m.dbias, blocks * V);
  for (int64_t i = 0; i < blocks; ++i) {
    const ChannelBlock b = channel_block<F>(s, batch, group, first_block + i);
    load_A<F>(m.A + i * block_size, m.largest_A + i * V, s, k, b, m.state_offset);
    if (kConstantB) load_parameter<F>(m.B + i * block_size, s.B.data, s, k, b, m.state_offset);
    if (kConstantC) load_parameter<F>(m.C + i * block_size, s.C.data, s, k, b, m.state_offset);
    if (const StateView& v = d.last_state; v.data) {
      void* data = at(v.data, v.dtype, batch * v.batch + k * v.direction + b.channel * v.channel);
      for (int64_t n = 0; n < s.states; ++n) {
        const int64_t offset = n * v.state;
        load_block<F>(m.g + i * block_size + n * V, data, v.dtype, &offset, 1, v.channel, b.lanes);
      }
    }
  }

  const int64_t tiles = (direction.length + kTile - 1) / kTile;
  for (int64_t index = tiles - 1; index >= 0; --index) {
    const BackwardTile views(s, d, TokenTile(direction, index * kTile, kTile), batch, k);
    const TokenTile& tile = views.tokens;
    clear(m.dB, tile.count * block_size);
    clear(m.dC, tile.count * block_size);
    const ChannelBlock any = channel_block<F>(s, batch, group, first_block);
    auto B = coefficients<F, kConstantB>(s.B, s.states, tile, k, any, m.B_rows);
    auto C = coefficients<F, kConstantC>(s.C, s.states, tile, k, any, m.C_rows);
    for (int64_t i = blocks - 1; i >= 0; --i) {  // the last block first: it may be cut off
      const ChannelBlock b = channel_block<F>(s, batch, group, first_block + i);
      const Vec<F> skip = load_channels<F>(s.D, s, k, b);
      if (i > 0) views.prefetch(channel_block<F>(s, batch, group, first_block + i - 1));
      const Decays decays = choose_decays<F, kCommon>(load_tile<F>(m, s, views, k, b, skip), load(m.largest_A + i * V));
      const F* A = m.A + i * block_size;
      B.block = m.B + i * block_size;
      C.block = m.C + i * block_size;
      for_state_runs<kRun>(s.states, [&](auto run, int64_t n) {
        constexpr int kStates = decltype(run)::value;
        load_tile_states<F>(m.h, s, k, index, b, n, kStates);
        visit_decays<F, kCommon, false>(decays, [&](auto which) {
          if (s.z.data) {
            recompute<kStates, decltype(which)::value, true, F>(m, A, tile.count, B, C, n);
          } else {
            recompute<kStates, decltype(which)::value, false, F>(m, A, tile.count, B, C, n);
          }
        });
        adjoint<kStates, kConstantB, kConstantC, F>(m, A, m.g + i * block_size, m.dA + i * block_size, m.dBc + i * block_size,
                                                    m.dCc + i * block_size, s.states, tile.count, B, C, n);
      });
      if (b.lanes < V) {  // where B or C is inf or NaN, lanes without a channel hold NaN
        clear_lanes(m.dB, tile.count * s.states, b.lanes);
        clear_lanes(m.dC, tile.count * s.states, b.lanes);
      }
      store_tile<F>(m, s, d, views, k, b, skip, m.dD + i * V, m.dbias + i * V);
    }
    if (!kConstantB) store_projection<F>(m.dB, d.B, d.B_directions, s, tile, part, k, any);
    if (!kConstantC) store_projection<F>(m.dC, d.C, d.C_directions, s, tile, part, k, any);
  }

  for (int64_t i = 0; i < blocks; ++i) {
    const ChannelBlock b = channel_block<F>(s, batch, group, first_block + i);
    store_parameter<F>(m.dA + i * block_size, d.A, s, k, b, m.state_offset);
    if (kConstantB) store_parameter<F>(m.dBc + i * block_size, d.B, s, k, b, m.state_offset);
    if (kConstantC) store_parameter<F>(m.dCc + i * block_size, d.C, s, k, b, m.state_offset);
    store_channels<F>(m.dD + i * V, d.D, s, k, b);
    store_channels<F>(m.dbias + i * V, d.delta_bias, s, k, b);
    if (const StateView& v = d.initial_state; v.data) {
      void* data = at(v.data, v.dtype, batch * v.batch + k * v.direction + b.channel * v.channel);
      for (int64_t n = 0; n < s.states; ++n) {
        const int64_t offset = n * v.state;
        store_block<F>(m.g + i * block_size + n * V, data, v.dtype, &offset, 1, v.channel, b.lanes);
      }
    }
  }
}

template <class F>
void backward(const SelectiveScan& s, const SelectiveScanGradients& d, int64_t begin, int64_t end) {
  const int64_t per_part = blocks_per_part<F>(s), count = parts<F>(s), group_blocks = blocks_per_group<F>(s);
  BackwardScratch<F> m(s.states, per_part);
  const auto run = s.B.constant ? (s.C.constant ? backward_direction<F, true, true> : backward_direction<F, true, false>)
                                : (s.C.constant ? backward_direction<F, false, true> : backward_direction<F, false, false>);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % count, group = task / count % s.groups, batch = task / count / s.groups;
    const int64_t first = part * per_part, left = group_blocks - first;
    for (int64_t k = 0; k < s.order.directions(); ++k)
      run(s, d, k, part, first, left < per_part ? left : per_part, batch, group, m);
  }
}

}  // namespace

int64_t selective_scan_backward_parts(const SelectiveScan& s) { return s.is_double ? parts<double>(s) : parts<float>(s); }

int64_t selective_scan_backward_tasks(const SelectiveScan& s) { return s.batch * s.groups * selective_scan_backward_parts(s); }

void selective_scan_backward(const SelectiveScan& s, const SelectiveScanGradients& d, int64_t begin, int64_t end) {
  s.is_double ? backward<double>(s, d, begin, end) : backward<float>(s, d, begin, end);
}

}  // namespace iumad::IUMAD_ISA
