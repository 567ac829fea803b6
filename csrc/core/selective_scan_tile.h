// What forward and backward of the selective scan share: a block of channels, a tile of tokens, and how both are read.
#pragma once

#include "block.h"
#include "math.h"
#include "scratch.h"
#include "selective_scan.h"

namespace iumad::IUMAD_ISA {

constexpr int kTile = kScanTile;

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

// The pixels of up to kTile consecutive tokens of a direction.
struct TokenTile {
  int count;
  int64_t row[kTile], column[kTile];

  TokenTile(const ScanDirection& d, int64_t first) {
    const int64_t left = d.length - first;
    count = int(left < kTile ? left : kTile);
    int64_t outer = first / d.inner, inner = first % d.inner;
    for (int t = 0; t < count; ++t) {
      row[t] = d.row + outer * d.outer_row + inner * d.inner_row;
      column[t] = d.column + outer * d.outer_column + inner * d.inner_column;
      if (++inner == d.inner) inner = 0, ++outer;
    }
  }

  void offsets(int64_t row_stride, int64_t column_stride, int64_t* offset) const {
    for (int t = 0; t < count; ++t) offset[t] = row[t] * row_stride + column[t] * column_stride;
  }
};

inline void* at(void* data, DType dtype, int64_t offset) { return static_cast<char*>(data) + offset * size_of(dtype); }

template <class F>
void load_tokens(F* dst, const TokenView& v, const TokenTile& tile, int64_t k, const ChannelBlock& b) {
  int64_t offset[kTile];
  tile.offsets(v.row, v.column, offset);
  void* data = at(v.data, v.dtype, b.batch * v.batch + k * v.direction + b.channel * v.channel);
  load_block<F>(dst, data, v.dtype, offset, tile.count, v.channel, b.lanes);
}

template <class F>
void store_tokens(const F* src, const TokenView& v, const TokenTile& tile, int64_t k, const ChannelBlock& b, bool accumulate) {
  int64_t offset[kTile];
  tile.offsets(v.row, v.column, offset);
  void* data = at(v.data, v.dtype, b.batch * v.batch + k * v.direction + b.channel * v.channel);
  store_block<F>(src, data, v.dtype, offset, tile.count, v.channel, b.lanes, accumulate);
}

// delta where groups of channels share a row.
template <class F>
void load_delta(F* dst, const SelectiveScan& s, const TokenTile& tile, int64_t k, const ChannelBlock& b) {
  if (s.delta_rows == s.dim) return load_tokens<F>(dst, s.delta, tile, k, b);
  constexpr int V = kLanes<F>;
  const TokenView& v = s.delta;
  visit<F>(v.dtype, v.data, [&](auto* p) {
    for (int lane = 0; lane < V; ++lane) {
      const int64_t channel = b.channel + (lane < b.lanes ? lane : 0);
      const auto* row = p + b.batch * v.batch + k * v.direction + channel * s.delta_rows / s.dim * v.channel;
      for (int t = 0; t < tile.count; ++t)
        dst[t * V + lane] = lane < b.lanes ? to_compute(row[tile.row[t] * v.row + tile.column[t] * v.column]) : F(0);
    }
  });
}

// delta + bias, then softplus where asked; derivative (may be null) is d(result) / d(delta). Unused lanes get dt = 0.
template <class F>
void finish_delta(F* dt, F* derivative, const SelectiveScan& s, int count, int64_t k, const ChannelBlock& b) {
  constexpr int V = kLanes<F>;
  F bias[V] = {}, used[V] = {};
  for (int lane = 0; lane < b.lanes; ++lane) {
    if (s.delta_bias) bias[lane] = static_cast<const F*>(s.delta_bias)[k * s.dim + b.channel + lane];
    used[lane] = F(1);
  }
  for (int t = 0; t < count; ++t) {
    Vec<F> x = load(dt + t * V) + load(bias), slope = broadcast(F(1));
    if (s.delta_softplus) {
      const Softplus<F> y = softplus<F>(x);
      x = y.value;
      slope = y.derivative;
    }
    store<F>(dt + t * V, b.lanes == V ? x : x * load(used));
    if (derivative) store<F>(derivative + t * V, slope);
  }
}

// A parameter (directions, dim, states) as [state][lane].
template <class F>
void load_parameter(F* dst, const void* data, const SelectiveScan& s, int64_t k, const ChannelBlock& b,
                    const int64_t* state_offset) {
  F* p = const_cast<F*>(static_cast<const F*>(data)) + (k * s.dim + b.channel) * s.states;
  load_block<F>(dst, p, sizeof(F) == 8 ? DType::kFloat64 : DType::kFloat32, state_offset, s.states, s.states, b.lanes);
}

// One of D, delta_bias (directions, dim) as lanes; zeros when absent.
template <class F>
Vec<F> load_channels(const void* data, const SelectiveScan& s, int64_t k, const ChannelBlock& b) {
  F v[kLanes<F>] = {};
  if (data)
    for (int lane = 0; lane < b.lanes; ++lane) v[lane] = static_cast<const F*>(data)[k * s.dim + b.channel + lane];
  return load(v);
}

// B or C as the inner loops read it: for a token and a state either one value for all lanes (a varying projection's row) or a
// vector (a constant projection's [state][lane] block).
template <class F, bool kConstant>
struct Coefficients {
  const F* row[kTile];  // per token; unused when constant
  const F* block;       // [state][lane]; unused when varying

  Vec<F> operator()(int token, int64_t state) const {
    if constexpr (kConstant) {
      return load(block + state * kLanes<F>);
    } else {
      return broadcast(row[token][state]);
    }
  }
};

template <class F, bool kConstant>
Coefficients<F, kConstant> coefficients(const ProjectionView& v, const F* block, const TokenTile& tile, int64_t k,
                                        const ChannelBlock& b) {
  Coefficients<F, kConstant> c;
  c.block = block;
  if constexpr (!kConstant) {
    const F* base = static_cast<const F*>(v.data) + b.batch * v.batch + k * v.direction + b.group * v.group;
    for (int t = 0; t < tile.count; ++t) c.row[t] = base + tile.row[t] * v.row + tile.column[t] * v.column;
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
