#include "selective_scan.h"

#include "selective_scan_tile.h"

namespace iumad::IUMAD_ISA {

// selective_scan_backward.cpp
int64_t selective_scan_backward_parts(const SelectiveScan&);
int64_t selective_scan_backward_tasks(const SelectiveScan&);
void selective_scan_backward(const SelectiveScan&, const SelectiveScanGradients&, int64_t begin, int64_t end);

namespace {

// States advanced together: enough independent chains to hide latency, few enough for the registers.
constexpr int kRun = kVectorBytes == 64 ? 16 : 8;

// Channel blocks that walk the tiles together: their rows lie next to each other in channels-last memory.
constexpr int64_t kMostBlocks = 16;
constexpr int64_t kTasksWanted = 16;
constexpr int64_t kAhead = 2;  // how many blocks before its turn a block's memory is asked for

template <class F>
int64_t blocks_per_task(const SelectiveScan& s) {
  const int64_t blocks = s.batch * s.groups * blocks_per_group<F>(s) / kTasksWanted;
  return blocks < 1 ? 1 : blocks > kMostBlocks ? kMostBlocks : blocks;
}

// What the recurrence of a tile of one channel block reads, [token][lane]; y holds D u and becomes the output.
template <class F>
struct Prepared {
  F *dt, *dtu, *y;
  F* largest;  // magnitude of dt, [lane]
};

template <class F>
struct ForwardScratch {
  static constexpr int V = kLanes<F>;
  Scratch memory;
  F *u, *delta;                // [token][lane], where a tile is not read in place
  Prepared<F> now, next;       // the block being scanned, and the one after it
  F *A, *B, *C, *h;            // [block][state][lane]; A times log2(e)
  F* largest_A;                // [block][lane]
  F *B_rows, *C_rows;          // [token][state], where they are not read in place
  int64_t* state_offset;       // 0, 1, 2, ...
  int64_t dense[kMostTokens];  // offsets of the tokens in such a buffer
  ChannelBlock* block;

  ForwardScratch(int64_t states, int64_t blocks)
      : memory(8 * Scratch::bytes<F>(kMostTokens * V) + 2 * Scratch::bytes<F>(V) + 4 * Scratch::bytes<F>(blocks * states * V) +
               Scratch::bytes<F>(blocks * V) + Scratch::bytes<int64_t>(states) + Scratch::bytes<ChannelBlock>(blocks) +
               2 * Scratch::bytes<F>(kMostTokens * states)) {
    for (F** p : {&u, &delta, &now.dt, &now.dtu, &now.y, &next.dt, &next.dtu, &next.y}) *p = memory.take<F>(kMostTokens * V);
    for (F** p : {&now.largest, &next.largest}) *p = memory.take<F>(V);
    for (F** p : {&A, &B, &C, &h}) *p = memory.take<F>(blocks * states * V);
    largest_A = memory.take<F>(blocks * V);
    state_offset = memory.take<int64_t>(states);
    for (int64_t n = 0; n < states; ++n) state_offset[n] = n;
    for (int t = 0; t < kMostTokens; ++t) dense[t] = t * V;
    block = memory.take<ChannelBlock>(blocks);
    for (F** p : {&B_rows, &C_rows}) *p = memory.take<F>(kMostTokens * states);
  }
};

// Advances `kStates` states, the first of which A and h point to, through the tokens of a tile, calling also(t) for every token.
// What they add to p.y goes to out[offset[t]]. A function of its own so that the registers are all its own; several decays before
// their states, for one's arithmetic is a single long chain.
template <int kStates, Decays decays, class F, class BAt, class CAt, class T, class Also>
__attribute__((noinline)) void scan_tile(const F* A, F* h, const Prepared<F>& p, int count, const BAt& B, const CAt& C,
                                         int64_t first, T* out, const int64_t* offset, Also also) {
  constexpr int V = kLanes<F>, kMost = kVectorBytes == 64 ? 4 : 2, kTogether = kStates < kMost ? kStates : kMost;
  Vec<F> state[kStates];
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) state[n] = load(h + n * V);
  for (int t = 0; t < count; ++t) {
    also(t);
    const F *b = B.from(t, first), *c = C.from(t, first);
    const Vec<F> step = load(p.dt + t * V), input = load(p.dtu + t * V);
    Vec<F> sum = load(p.y + t * V);
    IUMAD_UNROLL for (int n = 0; n < kStates; n += kTogether) {
      Vec<F> kept[kTogether];
      IUMAD_UNROLL for (int i = 0; i < kTogether; ++i) kept[i] = decay<decays, F>(step, load(A + (n + i) * V));
      IUMAD_UNROLL for (int i = 0; i < kTogether; ++i) {  // rounded: else g++ fuses the other product and copies the input for it
        state[n + i] = fma(kept[i], state[n + i], rounded<F>(input * B.value(b, n + i)));
        sum = fma(state[n + i], C.value(c, n + i), sum);
      }
    }
    store_lanes(out + offset[t], sum);
  }
  IUMAD_UNROLL for (int n = 0; n < kStates; ++n) store<F>(h + n * V, state[n]);
}

template <class F>
void load_parameters(const SelectiveScan& s, int64_t k, const ChannelBlock& b, int64_t index, ForwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  const int64_t at_block = index * s.states * V;
  load_A<F>(m.A + at_block, m.largest_A + index * V, s, k, b, m.state_offset);
  if (s.B.constant) load_parameter<F>(m.B + at_block, s.B.data, s, k, b, m.state_offset);
  if (s.C.constant) load_parameter<F>(m.C + at_block, s.C.data, s, k, b, m.state_offset);
}

template <class F>
void load_initial_state(const SelectiveScan& s, int64_t k, const ChannelBlock& b, int64_t index, ForwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  const int64_t at_block = index * s.states * V;
  const StateView& v = s.initial_state;
  if (v.data == nullptr) {
    std::memset(m.h + at_block, 0, s.states * V * sizeof(F));
    return;
  }
  void* data = at(v.data, v.dtype, b.batch * v.batch + k * v.direction + b.channel * v.channel);
  if (v.state == 1) {
    load_block<F>(m.h + at_block, data, v.dtype, m.state_offset, s.states, v.channel, b.lanes, 1);
  } else {
    for (int64_t n = 0; n < s.states; ++n) {
      const int64_t offset = n * v.state;
      load_block<F>(m.h + at_block + n * V, data, v.dtype, &offset, 1, v.channel, b.lanes);
    }
  }
}

template <class F>
void store_last_state(const SelectiveScan& s, int64_t k, const ChannelBlock& b, const F* h, const int64_t* state_offset) {
  const StateView& v = s.last_state;
  if (v.data == nullptr) return;
  void* data = at(v.data, v.dtype, b.batch * v.batch + k * v.direction + b.channel * v.channel);
  if (v.state == 1) {
    store_block<F>(h, data, v.dtype, state_offset, s.states, v.channel, b.lanes);
  } else {
    for (int64_t n = 0; n < s.states; ++n) {
      const int64_t offset = n * v.state;
      store_block<F>(h + n * kLanes<F>, data, v.dtype, &offset, 1, v.channel, b.lanes);
    }
  }
}

// The tensors of one tile that have a value per token and channel.
struct ForwardTile {
  TokenTile tokens;
  TileView u, delta, z, out;

  ForwardTile(const SelectiveScan& s, const TokenTile& tile, int64_t batch, int64_t k)
      : tokens(tile),
        u(s.u, tile, batch, k),
        delta(s.delta, tile, batch, k),
        z(s.z, tile, batch, k),
        out(s.out, tile, batch, k) {}
};

// Whether nothing more exact than bfloat16 comes of it: a last state is a float.
inline bool eight_bits(const SelectiveScan& s) { return s.out.dtype == DType::kBFloat16 && !s.last_state.data; }

template <class F>
bool in_place(const TileView& v, const ChannelBlock& b) {
  return v.view->channel == 1 && b.lanes == kLanes<F>;
}

// What the recurrence needs of `count` tokens, those of u and delta being at the offsets. kCoarse: for results of eight bits.
template <bool kCoarse, class F, class T>
void prepare_tokens(const Prepared<F>& p, const T* u, const int64_t* u_offset, const T* delta, const int64_t* delta_offset,
                    int count, Vec<F> bias, Vec<F> skip, bool apply_softplus) {
  constexpr int V = kLanes<F>;
  F *dt_row = p.dt, *dtu_row = p.dtu, *y_row = p.y;
  Vec<F> largest{};
  // Several tokens at a time, for the softplus is a single long chain.
  const auto from = [&](int t, auto tokens) __attribute__((always_inline)) {
    constexpr int kTokens = decltype(tokens)::value;
    Vec<F> dt[kTokens];
    IUMAD_UNROLL for (int i = 0; i < kTokens; ++i) dt[i] = load_lanes(delta + delta_offset[t + i]) + bias;
    if (apply_softplus) {
      Vec<F> e[kTokens];
      IUMAD_UNROLL for (int i = 0; i < kTokens; ++i) e[i] = exp<F, Range::kFinite>(minus_abs<F>(dt[i]));
      IUMAD_UNROLL for (int i = 0; i < kTokens; ++i) dt[i] = softplus<F, kCoarse>(dt[i], e[i]).value;
    }
    IUMAD_UNROLL for (int i = 0; i < kTokens; ++i) {
      const Vec<F> ut = load_lanes(u + u_offset[t + i]);
      largest = larger<F>(abs<F>(dt[i]), largest);
      store<F>(dt_row + (t + i) * V, dt[i]);
      store<F>(dtu_row + (t + i) * V, dt[i] * ut);
      store<F>(y_row + (t + i) * V, skip * ut);
    }
  };
  int t = 0;
  for (; t + 4 <= count; t += 4) from(t, std::integral_constant<int, 4>{});
  for (; t < count; ++t) from(t, std::integral_constant<int, 1>{});
  store<F>(p.largest, largest);
}

// Reads u and delta of a tile of one channel block into `p`.
template <class F>
__attribute__((noinline)) void prepare(const SelectiveScan& s, int64_t k, const ForwardTile& tile, const ChannelBlock& b,
                                       const Prepared<F>& p, const ForwardScratch<F>& m) {
  const Vec<F> bias = load_channels<F>(s.delta_bias, s, k, b), skip = load_channels<F>(s.D, s, k, b);
  const int count = tile.tokens.count;
  if (s.u.dtype == s.delta.dtype && s.delta_rows == s.dim && in_place<F>(tile.u, b) && in_place<F>(tile.delta, b)) {
    return visit<F>(s.u.dtype, tile.u.block(b), [&](auto* u) {
      using T = std::remove_pointer_t<decltype(u)>;
      constexpr bool kCoarse = std::is_same_v<T, BFloat16>;
      const auto tokens = kCoarse && eight_bits(s) ? prepare_tokens<kCoarse, F, T> : prepare_tokens<false, F, T>;
      const T* delta = reinterpret_cast<T*>(tile.delta.block(b));
      tokens(p, u, tile.u.offset, delta, tile.delta.offset, count, bias, skip, s.delta_softplus);
    });
  }
  load_tokens<F>(m.u, tile.u, b);
  load_delta<F>(m.delta, s, tile.delta, b);
  prepare_tokens<false, F, F>(p, m.u, m.dense, m.delta, m.dense, count, bias, skip, s.delta_softplus);
}

// y times silu(z).
template <class F>
void gate(const TileView& view, const ChannelBlock& b, F* y, F* z) {
  constexpr int V = kLanes<F>;
  load_tokens<F>(z, view, b);
  for (int t = 0; t < view.count; ++t) {
    const Vec<F> x = load(z + t * V);
    store<F>(y + t * V, load(y + t * V) * x * sigmoid<F>(x));
  }
}

// The tokens of a direction for the `blocks` channel blocks in m.block.
template <class F, bool kConstantB, bool kConstantC>
void scan_tokens(const SelectiveScan& s, int64_t k, const ScanDirection& direction, int64_t blocks, ForwardScratch<F>& m) {
  constexpr int V = kLanes<F>;
  constexpr bool kCommon = !kConstantB && !kConstantC;
  const int64_t batch = m.block[0].batch, block_size = s.states * V;
  const bool again = k > 0 && s.order.overlaps();  // an earlier direction has written these pixels
  const bool plain = !s.z.data && !again;
  const bool as_computed = s.out.dtype == kDTypeOf<F>;
  const bool coarse = eight_bits(s);
  const int tokens = s.tile_states ? kTile : kMostTokens;
  ForwardTile tile(s, TokenTile(direction, 0, tokens), batch, k);
  prepare<F>(s, k, tile, m.block[0], m.next, m);
  for (int64_t first = 0; first < direction.length; first += tokens) {
    const bool last = first + tokens >= direction.length;
    const ForwardTile next(s, TokenTile(direction, last ? first : first + tokens, tokens), batch, k);
    auto B = coefficients<F, kConstantB>(s.B, s.states, tile.tokens, k, m.block[0], m.B_rows);
    auto C = coefficients<F, kConstantC>(s.C, s.states, tile.tokens, k, m.block[0], m.C_rows);
    for (int64_t i = 0; i < blocks; ++i) {
      std::swap(m.now, m.next);
      // Loads before stores: input and output lie at the same offsets within their pages, and a load that follows a store to the
      // same offset waits until that store has left for memory.
      if (i + 1 < blocks) {
        prepare<F>(s, k, tile, m.block[i + 1], m.next, m);
      } else if (!last) {
        prepare<F>(s, k, next, m.block[0], m.next, m);
      }
      const bool here = i + kAhead < blocks;
      const ForwardTile& later = here ? tile : next;
      const ChannelBlock& later_block = m.block[here ? i + kAhead : (i + kAhead) % blocks];
      const Prefetch u(later.u, later_block), delta(later.delta, later_block), z(later.z, later_block),
          out(later.out, later_block);
      F *h = m.h + i * block_size, *A = m.A + i * block_size;
      if (s.tile_states) save_tile_states<F>(h, s, k, first / kTile, m.block[i]);
      B.block = m.B + i * block_size;
      C.block = m.C + i * block_size;
      const Decays decays = choose_decays<F, kCommon>(load(m.now.largest), load(m.largest_A + i * V), coarse);
      // The last run of states writes the tokens where they belong, unless something is still to be done with them.
      const bool finishes = plain && in_place<F>(tile.out, m.block[i]) && (as_computed || decays.coarse);
      for_state_runs<kRun>(s.states, [&](auto run, int64_t n) {
        constexpr int kStates = decltype(run)::value;
        const bool out_now = finishes && n + kStates == s.states;
        char* out_data = tile.out.block(m.block[i]);
        const auto scan = [&](auto also) {
          visit_decays<F, kCommon, true>(decays, [&](auto which) {
            constexpr Decays kDecays = decltype(which)::value;
            using Out = std::conditional_t<kDecays.coarse, BFloat16, F>;
            const auto to = [&](auto* y, const int64_t* offset) {
              scan_tile<kStates, kDecays, F>(A + n * V, h + n * V, m.now, tile.tokens.count, B, C, n, y, offset, also);
            };
            out_now ? to(reinterpret_cast<Out*>(out_data), tile.out.offset) : to(m.now.y, m.dense);
          });
        };
        if (n == 0) {
          scan([ u, delta, z, out ](int t) __attribute__((always_inline)) {
            u(t);
            delta(t);
            z(t);
            out(t);
          });
        } else {
          scan([](int) {});
        }
      });
      if (finishes) continue;
      if (s.z.data) gate<F>(tile.z, m.block[i], m.now.y, m.now.dt);
      store_tokens<F>(m.now.y, tile.out, m.block[i], again);
    }
    tile = next;
  }
}

template <class F, bool kConstantB, bool kConstantC>
void scan_direction(const SelectiveScan& s, int64_t k, int64_t blocks, ForwardScratch<F>& m) {
  const ScanDirection direction = s.order.direction(k);
  for (int64_t i = 0; i < blocks; ++i) load_initial_state<F>(s, k, m.block[i], i, m);
  if (direction.length > 0) scan_tokens<F, kConstantB, kConstantC>(s, k, direction, blocks, m);
  for (int64_t i = 0; i < blocks; ++i) store_last_state<F>(s, k, m.block[i], m.h + i * s.states * kLanes<F>, m.state_offset);
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
  int64_t loaded = -1;  // whose parameters are in scratch: the same channels of the whole batch follow one another
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task % s.batch, channels = task / s.batch, first = channels % count * per_task,
                  group = channels / count;
    const int64_t left = group_blocks - first, blocks = left < per_task ? left : per_task;
    for (int64_t i = 0; i < blocks; ++i) m.block[i] = channel_block<F>(s, batch, group, first + i);
    for (int64_t k = 0; k < s.order.directions(); ++k) {
      if (const int64_t now = channels * s.order.directions() + k; std::exchange(loaded, now) != now)
        for (int64_t i = 0; i < blocks; ++i) load_parameters<F>(s, k, m.block[i], i, m);
      run(s, k, blocks, m);
    }
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
  visit_decays<float, true, false>(choose_decays<float, true>(load(step), load(A)), [&](auto which) {
    for (int64_t i = 0; i < count / (kRun * V); ++i) {
      const Vec<float> x = load(step + i % kTile * V);
      IUMAD_UNROLL for (int n = 0; n < kRun; ++n) sum += decay<decltype(which)::value, float>(x, load(A + n * V));
    }
  });
  return sum_lanes<float>(sum);
}

}  // namespace

extern const SelectiveScanKernels selective_scan;
const SelectiveScanKernels selective_scan = {
    forward_tasks_any,       forward_any, selective_scan_backward_parts, selective_scan_backward_tasks,
    selective_scan_backward, exponentials};

}  // namespace iumad::IUMAD_ISA
