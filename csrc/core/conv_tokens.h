// The convolution over sequences whose channels are not neighbours in memory: tokens in lanes, one channel at a time, whose row
// of tokens is copied to scratch memory with what lies before and after it.
#pragma once

#include "conv_tile.h"
#include "silu.h"

namespace iumad::IUMAD_ISA {

inline bool tokens_in_lanes(const DepthwiseConv2d& s) {
  return s.height == 1 && s.kernel_height == 1 && s.stride == 1 && s.x.channel != 1 && !s.sequence;
}

// Tokens of a channel and batch, from `offset` on, to and from a row in scratch.
template <class F>
inline void load_row(F* dst, const GridView& v, int64_t offset, int64_t count) {
  visit<F>(v.dtype, v.data, [&](const auto* p) { load_run(dst, p + offset, v.column, count); });
}
template <class F>
inline void store_row(const F* src, const GridView& v, int64_t offset, int64_t count) {
  visit<F>(v.dtype, v.data, [&](auto* p) { store_run(p + offset, v.column, src, count); });
}

// Asks for the memory of some tokens of a channel and batch, a few at a time, for bursts would wait for each other. (g++ drops
// calls of functions that do nothing else.)
template <int kToStore>
[[gnu::always_inline]] inline void fetch(const GridView& v, int64_t batch, int64_t channel, int64_t first, int64_t count) {
  const char* p = static_cast<char*>(element(v, batch * v.batch + channel * v.channel + first * v.column));
  for (int64_t i = 0; i < count * size_of(v.dtype); i += 64) __builtin_prefetch(p + i, kToStore, 2);
}

template <class F>
inline void clear_row(F* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = F(0);
}

// Rows of one channel in scratch memory, of the compute type, with room for whole vectors at their ends.
template <class F>
struct ChannelRows {
  static constexpr int V = kLanes<F>;
  static constexpr int kRun = 4;   // vectors filtered at once, past the end of the row too
  static constexpr int kTaps = 4;  // taps whose gradients are summed at once; their number is rounded up, to be simple and quick
  const DepthwiseConv2d& s;
  const int64_t taps, length;
  Scratch memory;
  F *weight, *x, *z, *dz, *dx;  // x[j + t] is what tap j of output t meets; dz[taps - 1 + t]
  F bias = 0;

  explicit ChannelRows(const DepthwiseConv2d& s)
      : s(s), taps(s.kernel_width), length(s.width), memory(Scratch::bytes<F>(taps) + 4 * Scratch::bytes<F>(row())) {
    weight = memory.take<F>(taps);
    x = memory.take<F>(row());
    z = memory.take<F>(row());
    dz = memory.take<F>(row());
    dx = memory.take<F>(row());
  }
  int64_t row() const { return length + 2 * taps + kRun * V + kTaps; }

  void take_channel(int64_t channel) {
    load_row(weight, s.weight, channel * s.weight.channel, taps);
    if (s.bias.data) load_row(&bias, s.bias, channel * s.bias.channel, 1);
  }

  // out[i] = start + sum over the taps of weight[j] in[i + j step]
  void sum_taps(const F* in, int64_t step, F start, int64_t count, F* out) const {
    for (int64_t i = 0; i < count; i += kRun * V) {
      Vec<F> sum[kRun];
      IUMAD_UNROLL
      for (int k = 0; k < kRun; ++k) sum[k] = broadcast(start);
      for (int64_t j = 0; j < taps; ++j) {
        const Vec<F> w = broadcast(weight[j]);
        IUMAD_UNROLL
        for (int k = 0; k < kRun; ++k) sum[k] = fma(w, load(in + i + k * V + j * step), sum[k]);
      }
      IUMAD_UNROLL
      for (int k = 0; k < kRun; ++k) store<F>(out + i + k * V, sum[k]);
    }
  }

  // z of a row, before the SiLU.
  void filter(int64_t batch, int64_t channel) {
    clear_row(x, s.pad_left);
    if (s.history.data) load_row(x, s.history, batch * s.history.batch + channel * s.history.channel, s.pad_left);
    load_row(x + s.pad_left, s.x, batch * s.x.batch + channel * s.x.channel, length);
    clear_row(x + s.pad_left + length, row() - s.pad_left - length);
    sum_taps(x, 1, bias, length, z);
  }

  // out of a row, in the place of z.
  void activate(int64_t batch, int64_t channel) {
    for (int64_t t = 0; t < length; t += kRun * V) {
      fetch<0>(s.x, batch, channel + 1, t, kRun * V);
      if (s.silu) silu<F, kRun>(z + t, z + t, V);
    }
  }

  // dz of a row, zeros around it.
  void output_gradient(const DepthwiseConv2dGradients& d, int64_t batch, int64_t channel) {
    F* p = dz + taps - 1;
    clear_row(dz, taps - 1);
    load_row(p, d.out, batch * d.out.batch + channel * d.out.channel, length);
    for (int64_t t = 0; t < length; t += kRun * V) {
      fetch<0>(s.x, batch, channel + 1, t, kRun * V);
      fetch<0>(d.out, batch, channel + 1, t, kRun * V);
      fetch<1>(d.x, batch, channel, t, kRun * V);
      if (s.silu) differentiate_silu<F, kRun>(z + t, p + t, V, p + t, V);
    }
    clear_row(p + length, row() - (taps - 1) - length);
  }

  // dx of a row and of the history before it; dweight[tap][lane] and dbias[lane] are added to.
  void input_gradient(F* dweight, F* dbias) {
    sum_taps(dz + taps - 1, -1, F(0), s.pad_left + length, dx);
    const F* g = dz + taps - 1;
    const int64_t whole = length / V * V;
    for (int64_t j0 = 0; j0 < taps; j0 += kTaps) {
      Vec<F> sum[kTaps] = {}, total{};
      for (int64_t t = 0; t < whole; t += V) {
        const Vec<F> v = load(g + t);
        total += v;
        IUMAD_UNROLL
        for (int j = 0; j < kTaps; ++j) sum[j] = fma(v, load(x + t + j0 + j), sum[j]);
      }
      IUMAD_UNROLL
      for (int j = 0; j < kTaps; ++j) store<F>(dweight + (j0 + j) * V, load(dweight + (j0 + j) * V) + sum[j]);
      if (j0 == 0) store<F>(dbias, load(dbias) + total);
    }
    // The rest one by one: past the row the zeros of dz would meet tokens, which may be infinite.
    for (int64_t t = whole; t < length; ++t) {
      dbias[0] += g[t];
      for (int64_t j = 0; j < taps; ++j) dweight[j * V] += g[t] * x[t + j];
    }
  }
};

// Tasks: a channel of one batch.
template <class F>
void forward_tokens(const DepthwiseConv2d& s, int64_t begin, int64_t end) {
  ChannelRows<F> rows(s);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t batch = task / s.channels, channel = task % s.channels;
    rows.take_channel(channel);
    rows.filter(batch, channel);
    rows.activate(batch, channel);
    store_row(rows.z, s.out, batch * s.out.batch + channel * s.out.channel, s.width);
  }
}

// Tasks: a channel of one of `parts` groups of batches.
template <class F>
void backward_tokens(const DepthwiseConv2d& s, const DepthwiseConv2dGradients& d, int64_t parts, int64_t begin, int64_t end) {
  constexpr int V = kLanes<F>;
  ChannelRows<F> rows(s);
  const int64_t room = (s.kernel_width + ChannelRows<F>::kTaps) * V;
  Scratch memory(Scratch::bytes<F>(room) + Scratch::bytes<F>(V));
  F *dweight = memory.take<F>(room), *dbias = memory.take<F>(V);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / s.channels, channel = task % s.channels;
    rows.take_channel(channel);
    clear_row(dweight, room);
    clear_row(dbias, V);
    for (int64_t batch = s.batch * part / parts; batch < s.batch * (part + 1) / parts; ++batch) {
      rows.filter(batch, channel);
      rows.output_gradient(d, batch, channel);
      rows.input_gradient(dweight, dbias);
      store_row(rows.dx + s.pad_left, d.x, batch * d.x.batch + channel * d.x.channel, s.width);
      if (s.history.data) store_row(rows.dx, d.history, batch * d.history.batch + channel * d.history.channel, s.pad_left);
    }
    for (int64_t j = 0; j < s.kernel_width; ++j)
      static_cast<F*>(d.weight)[task * s.kernel_width + j] = sum_lanes<F>(load(dweight + j * V));
    if (d.bias) static_cast<F*>(d.bias)[task] = sum_lanes<F>(load(dbias));
  }
}

}  // namespace iumad::IUMAD_ISA
