// What forward and backward of the selective scan share: a block of channels, a tile of tokens, and how both are read.
#pragma once

#include "block.h"
#include "math.h"
#include "scratch.h"
#include "selective_scan.h"

namespace iumad::IUMAD_ISA {

constexpr int kTile = kScanTile;        // tokens at a time where states are saved or read
constexpr int kMostTokens = 2 * kTile;  // and where they are not: what is done once per tile is done half as often

// A vector's worth of neighbouring channels inside one group of B and C.
struct ChannelBlock {
  int64_t batch, group, channel;
  int lanes;
};

template <class F>
int64_t blocks_per_group(const SelectiveScan& s) {
  return (s.dim / s.groups + kLanes<F> - 1) / kLanes<F>;
}

template <class F>
ChannelBlock channel_block(const SelectiveScan& s, int64_t batch, int64_t group, int64_t block) {
  const int64_t size = s.dim / s.groups, first = block * kLanes<F>;
  const int64_t left = size - first;
  return {batch, group, group * size + first, int(left < kLanes<F> ? left : kLanes<F>)};
}

// The pixels of up to `most` consecutive tokens of a direction.
struct TokenTile {
  int count;
  bool straight;  // all in one inner loop: neighbours are one inner step apart
  int64_t inner_row, inner_column;
  int64_t row[kMostTokens], column[kMostTokens];

  TokenTile(const ScanDirection& d, int64_t first, int most) {
    const int64_t left = d.length - first;
    count = int(left < most ? left : most);
    int64_t outer = first / d.inner, inner = first % d.inner;
    straight = inner + count <= d.inner;
    inner_row = d.inner_row;
    inner_column = d.inner_column;
    int64_t r = d.row + outer * d.outer_row + inner * d.inner_row, c = d.column + outer * d.outer_column + inner * d.inner_column;
    for (int t = 0; t < count; ++t) {
      row[t] = r;
      column[t] = c;
      r += d.inner_row;
      c += d.inner_column;
      if (++inner == d.inner) {
        inner = 0;
        ++outer;
        r = d.row + outer * d.outer_row;
        c = d.column + outer * d.outer_column;
      }
    }
  }
};

inline void* at(void* data, DType dtype, int64_t offset) { return static_cast<char*>(data) + offset * size_of(dtype); }

// A tile of one tensor: where its tokens lie, for any channel block.
struct TileView {
  const TokenView* view;
  char* data;  // of the tile's batch entry and direction; null where the tensor is absent
  int count;
  int step;                     // as unit_step
  int64_t offset[kMostTokens];  // of token t, in elements
  int64_t line[kMostTokens];    // bytes from a block's first channel to cache lines its tokens lie in, see prefetch

  TileView(const TokenView& v, const TokenTile& tile, int64_t batch, int64_t k)
      : view(&v), data(nullptr), count(tile.count), step(0), offset{}, line{} {
    if (v.data == nullptr) return;
    data = static_cast<char*>(at(v.data, v.dtype, batch * v.batch + k * v.direction));
    const int64_t difference = tile.inner_row * v.row + tile.inner_column * v.column;
    if (tile.straight) {
      step = difference == 1 || difference == -1 ? int(difference) : 0;
      const int64_t first = tile.row[0] * v.row + tile.column[0] * v.column;
      for (int t = 0; t < kMostTokens; ++t) offset[t] = first + t * difference;  // constant trip count: a few vector additions
    } else {
      for (int t = 0; t < tile.count; ++t) offset[t] = tile.row[t] * v.row + tile.column[t] * v.column;
    }
    const int64_t size = size_of(v.dtype), last = count > 0 ? count - 1 : 0;
    if (v.channel == 1) {
      for (int t = 0; t < kMostTokens; ++t) line[t] = offset[t < last ? t : last] * size;
    } else {  // the last token's of every channel, then the line before, ...: the first may have come with the tile before
      constexpr int64_t kLine = 64;
      const int lanes = kVectorBytes / (v.dtype == DType::kFloat64 ? 8 : 4);
      for (int t = 0; t < kMostTokens; ++t) {
        const int64_t before = t / lanes * (kLine / size);
        line[t] = (offset[before < last ? last - before : 0] + t % lanes * v.channel) * size;
      }
    }
  }

  char* block(const ChannelBlock& b) const { return data + b.channel * view->channel * size_of(view->dtype); }
};

template <class F>
void load_tokens(F* dst, const TileView& v, const ChannelBlock& b) {
  load_block<F>(dst, v.block(b), v.view->dtype, v.offset, v.count, v.view->channel, b.lanes, v.step);
}

template <class F>
void store_tokens(const F* src, const TileView& v, const ChannelBlock& b, bool accumulate) {
  store_block<F>(src, v.block(b), v.view->dtype, v.offset, v.count, v.view->channel, b.lanes, accumulate, v.step);
}

// Asks for a channel block's cache lines of a tile ahead of time, one per call: they are a whole row of channels or of tokens
// apart, too far for the hardware to guess, and asked for all at once they would hold up other loads. Always inlined: g++ takes
// a function that only prefetches for one without effect and drops the calls.
class Prefetch {
 public:
  Prefetch(const TileView& v, const ChannelBlock& b) : block_(v.data ? v.block(b) : nullptr), line_(v.line) {}
  __attribute__((always_inline)) void operator()(int t) const {
    if (block_ != nullptr) __builtin_prefetch(block_ + line_[t], 0, 2);
  }

 private:
  const char* block_;
  const int64_t* line_;
};

// delta where groups of channels share a row.
template <class F>
void load_delta(F* dst, const SelectiveScan& s, const TileView& v, const ChannelBlock& b) {
  if (s.delta_rows == s.dim) return load_tokens<F>(dst, v, b);
  constexpr int V = kLanes<F>;
  visit<F>(v.view->dtype, v.data, [&](auto* p) {
    for (int lane = 0; lane < V; ++lane) {
      const int64_t channel = b.channel + (lane < b.lanes ? lane : 0);
      const auto* row = p + channel * s.delta_rows / s.dim * v.view->channel;
      for (int t = 0; t < v.count; ++t) dst[t * V + lane] = lane < b.lanes ? to_compute(row[v.offset[t]]) : F(0);
    }
  });
}

// A parameter (directions, dim, states) as [state][lane].
template <class F>
void load_parameter(F* dst, const void* data, const SelectiveScan& s, int64_t k, const ChannelBlock& b,
                    const int64_t* state_offset) {
  F* p = const_cast<F*>(static_cast<const F*>(data)) + (k * s.dim + b.channel) * s.states;
  load_block<F>(dst, p, kDTypeOf<F>, state_offset, s.states, s.states, b.lanes);
}

// A of one channel block times log2(e), [state][lane], and the largest magnitude in each lane.
template <class F>
void load_A(F* A, F* largest, const SelectiveScan& s, int64_t k, const ChannelBlock& b, const int64_t* state_offset) {
  constexpr int V = kLanes<F>;
  load_parameter<F>(A, s.A, s, k, b, state_offset);
  Vec<F> most{};
  for (int64_t n = 0; n < s.states; ++n) {
    const Vec<F> a = load(A + n * V) * broadcast(kLog2E<F>);
    store<F>(A + n * V, a);
    most = larger<F>(abs<F>(a), most);
  }
  store<F>(largest, most);
}

// The exponential the decays of a tile take (math.h): for any arguments or for moderate ones; for results of eight bits or not.
struct Decays {
  bool moderate, coarse;
};

// Those that make a difference here. kChoice false: one has to do, as for constant projections, which are rare.
template <class F, bool kChoice>
constexpr bool kHasModerate = kChoice && !(kVectorBytes == 64 && sizeof(F) == 8);
template <class F, bool kChoice>
constexpr bool kHasCoarse = kChoice && kVectorBytes > 16 && sizeof(F) == 4;

// `dt` and `A` are the largest magnitudes in the tile and the block.
template <class F, bool kChoice>
Decays choose_decays(Vec<F> dt, Vec<F> A, bool coarse = false) {
  coarse = coarse && kHasCoarse<F, kChoice>;
  const Decays any = {false, coarse && kVectorBytes == 64};
  if (!kHasModerate<F, kChoice> || (kVectorBytes == 64 && !multiply_adds_cost_no_more())) return any;
  F exponent[kLanes<F>];
  store<F>(exponent, dt * A);
  for (F e : exponent)
    if (!(e <= kModerateExponent<F>)) return any;
  return {true, coarse};
}

// Calls f with the decays as a constant.
template <class F, bool kChoice, bool kMayBeCoarse, class Visitor>
__attribute__((always_inline)) inline void visit_decays(Decays decays, Visitor&& f) {
  if constexpr (kMayBeCoarse && kHasCoarse<F, kChoice>) {
    if (decays.coarse && decays.moderate) return f(std::integral_constant<Decays, Decays{true, true}>{});
    if constexpr (kVectorBytes == 64) {
      if (decays.coarse) return f(std::integral_constant<Decays, Decays{false, true}>{});
    }
  }
  if constexpr (kHasModerate<F, kChoice>) {
    if (decays.moderate) return f(std::integral_constant<Decays, Decays{true, false}>{});
  }
  f(std::integral_constant<Decays, Decays{false, false}>{});
}

template <Decays decays, class F>
inline Vec<F> decay(Vec<F> dt, Vec<F> A) {
  if constexpr (decays.coarse) return exp2_product_coarse<F, decays.moderate>(dt, A);
  return decays.moderate ? exp2_product_moderate<F>(dt, A) : exp2_product<F>(dt, A);
}

// One of D, delta_bias (directions, dim) as lanes; zeros when absent.
template <class F>
Vec<F> load_channels(const void* data, const SelectiveScan& s, int64_t k, const ChannelBlock& b) {
  if (data == nullptr) return Vec<F>{};
  const F* p = static_cast<const F*>(data) + k * s.dim + b.channel;
  if (b.lanes == kLanes<F>) return load(p);
  F v[kLanes<F>] = {};
  std::memcpy(v, p, b.lanes * sizeof(F));
  return load(v);
}

// The saved states at the start of a tile, [state][channel], move as whole vectors unless the block is cut off or straddles two
// chunks of kScanChunk channels.
template <class F, class Move>
void move_tile_states(const SelectiveScan& s, int64_t k, int64_t tile, const ChannelBlock& b, Move&& move) {
  F* base =
      static_cast<F*>(s.tile_states) + (b.batch * s.order.directions() + k) * s.chunks() * s.tiles() * s.states * kScanChunk;
  for (int lane = 0; lane < b.lanes;) {
    const int64_t chunk = (b.channel + lane) / kScanChunk, column = (b.channel + lane) % kScanChunk;
    const int left = int(kScanChunk - column), run = b.lanes - lane < left ? b.lanes - lane : left;
    move(base + (chunk * s.tiles() + tile) * s.states * kScanChunk + column, lane, run);
    lane += run;
  }
}

template <class F>
void save_tile_states(const F* h, const SelectiveScan& s, int64_t k, int64_t tile, const ChannelBlock& b) {
  constexpr int V = kLanes<F>;
  move_tile_states<F>(s, k, tile, b, [&](F* saved, int lane, int run) {
    for (int64_t n = 0; n < s.states; ++n) {
      if (run == V) {
        store<F>(saved + n * kScanChunk, load(h + n * V));
      } else {
        std::memcpy(saved + n * kScanChunk, h + n * V + lane, run * sizeof(F));
      }
    }
  });
}

// The states first, first + 1, ... of `count` into h[state][lane]; unused lanes become 0.
template <class F>
void load_tile_states(F* h, const SelectiveScan& s, int64_t k, int64_t tile, const ChannelBlock& b, int64_t first, int count) {
  constexpr int V = kLanes<F>;
  if (b.lanes < V) std::memset(h, 0, count * V * sizeof(F));
  move_tile_states<F>(s, k, tile, b, [&](const F* saved, int lane, int run) {
    for (int n = 0; n < count; ++n) {
      const F* row = saved + (first + n) * kScanChunk;
      if (run == V) {
        store<F>(h + n * V, load(row));
      } else {
        std::memcpy(h + n * V + lane, row, run * sizeof(F));
      }
    }
  });
}

// B or C as the inner loops read it: for a token and a state either one value for all lanes (a varying projection's row) or a
// vector (a constant projection's [state][lane] block).
template <class F, bool kConstant>
struct Coefficients {
  const F* row[kMostTokens];  // per token; unused when constant
  const F* block;             // [state][lane]; unused when varying

  // Those of a token from a state on, which follow at constant distances.
  const F* from(int token, int64_t first) const { return kConstant ? block + first * kLanes<F> : row[token] + first; }
  static Vec<F> value(const F* from, int n) { return kConstant ? load(from + n * kLanes<F>) : broadcast(from[n]); }
};

// Those of a tile: rows of a varying projection in place where they are of the compute type, else converted into `converted`. The
// block of a constant one is the channel block's, which the caller enters.
template <class F, bool kConstant>
Coefficients<F, kConstant> coefficients(const ProjectionView& v, int64_t states, const TokenTile& tile, int64_t k,
                                        const ChannelBlock& b, F* converted) {
  Coefficients<F, kConstant> c;
  if constexpr (!kConstant) {
    visit<F>(v.dtype, const_cast<void*>(v.data), [&](auto* p) {
      using T = std::remove_pointer_t<decltype(p)>;
      p += b.batch * v.batch + k * v.direction + b.group * v.group;
      for (int t = 0; t < tile.count; ++t) {
        T* row = p + tile.row[t] * v.row + tile.column[t] * v.column;
        if constexpr (std::is_same_v<T, F>) {
          c.row[t] = row;
        } else {
          F* to = converted + t * states;
          load_run(to, row, 1, states);
          c.row[t] = to;
        }
      }
    });
  }
  return c;
}

// Calls f<kStates>(first) for runs of states that keep their recurrence in registers; any number of states is a sum of such runs.
template <int kMost, class Visitor>
void for_state_runs(int64_t states, Visitor&& f) {
  int64_t n = 0;
  for (; n + kMost <= states; n += kMost) f(std::integral_constant<int, kMost>{}, n);
  if constexpr (kMost > 1) {
    if (n < states) {
      for_state_runs<kMost / 2>(states - n, [&](auto run, int64_t first) { f(run, n + first); });
    }
  }
}

}  // namespace iumad::IUMAD_ISA
