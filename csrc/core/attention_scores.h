// Rows of attention scores: scaling, masks, the softmax and dropout. x is kept in units of log 2, so that exp is one exp2.
#pragma once

#include "cross_attention.h"
#include "math.h"
#include "philox.h"
#include "rows.h"

namespace iumad::IUMAD_ISA {

template <class F>
constexpr F kInfinity = std::is_same_v<F, double> ? F(__builtin_inf()) : F(__builtin_inff());

// The keys [first, first + count) that one step works on, in buffers of `padded` columns.
struct KeyBlock {
  int64_t first, count, padded;
};

// How many keys of the block query i sees; the rest of the row is -inf.
inline int64_t visible_keys(const CrossAttention& s, const KeyBlock& block, int64_t i) {
  if (!s.causal) return block.count;
  const int64_t n = i + 1 - block.first;
  return n < 0 ? 0 : n < block.count ? n : block.count;
}

// Additive bias of a row in units of log 2: the mask of (batch b, head h, query i) over the block.
template <class F>
inline void load_bias(F* bias, const MaskView& mask, const KeyBlock& block, int64_t b, int64_t h, int64_t i) {
  const int64_t first = b * mask.batch + h * mask.head + i * mask.query + block.first * mask.key;
  if (mask.is_bool) {
    const uint8_t* p = static_cast<const uint8_t*>(mask.data) + first;
    for (int64_t j = 0; j < block.count; ++j) bias[j] = p[j * mask.key] ? F(0) : -kInfinity<F>;
    return;
  }
  visit<F>(mask.dtype, mask.data, [&](auto* data) {
    const auto* p = data + first;
    int64_t j = 0;
    if (mask.key == 1)
      for (; j + kLanes<F> <= block.count; j += kLanes<F>) store<F>(bias + j, load_lanes(p + j) * broadcast(kLog2E<F>));
    for (; j < block.count; ++j) bias[j] = F(to_compute(p[j * mask.key])) * kLog2E<F>;
  });
}

// Lane mask: the first `count` lanes (none if it is negative).
template <class F>
inline Vec<IntOf<F>> first_lanes(int64_t count) {
  using I = Vec<IntOf<F>>;
  I lane;
  for (int i = 0; i < kLanes<F>; ++i) lane[i] = IntOf<F>(i);
  return lane < I{} + IntOf<F>(count < kLanes<F> ? count : kLanes<F>);
}

// row = factor * row + bias over the visible keys, -inf over the rest of the row; returns the maximum (-inf if nothing is seen).
template <class F>
inline F scale_row(F* row, int64_t padded, int64_t visible, F factor, const F* bias) {
  using V = Vec<F>;
  constexpr int n = kLanes<F>;
  const V scale = broadcast(factor), lowest = broadcast(-kInfinity<F>);
  V best = lowest;
  const auto step = [&](int64_t j, V x) {
    store<F>(row + j, x);
    best = larger<F>(x, best);
  };
  int64_t j = 0;
  if (bias) {
    for (; j + n <= visible; j += n) step(j, fma(load(row + j), scale, load(bias + j)));
  } else {
    for (; j + n <= visible; j += n) step(j, load(row + j) * scale);
  }
  for (; j < padded; j += n) {
    const V x = fma(load(row + j), scale, bias ? load(bias + j) : V{});
    step(j, first_lanes<F>(visible - j) ? x : lowest);
  }
  return max_lanes<F>(best);
}

// Maximum over the visible keys; the rest of the row becomes -inf.
template <class F>
inline F max_row(F* row, int64_t padded, int64_t visible) {
  const Vec<F> lowest = broadcast(-kInfinity<F>);
  Vec<F> best = lowest;
  int64_t j = 0;
  for (; j + kLanes<F> <= visible; j += kLanes<F>) {
    const Vec<F> x = load(row + j);
    best = larger<F>(x, best);
  }
  for (; j < padded; j += kLanes<F>) {
    const Vec<F> x = first_lanes<F>(visible - j) ? load(row + j) : lowest;
    store<F>(row + j, x);
    best = larger<F>(x, best);
  }
  return max_lanes<F>(best);
}

// row = 2^(factor * row - shift); returns the sum. The factor is positive.
template <class F>
inline F exp_row(F* row, int64_t padded, F factor, F shift) {
  const Vec<F> scale = broadcast(factor), offset = broadcast(-shift);
  Vec<F> sum{};
  for (int64_t j = 0; j < padded; j += kLanes<F>) {
    const Vec<F> p = exp2<F, Range::kFinite>(fma(load(row + j), scale, offset));
    store<F>(row + j, p);
    sum += p;
  }
  return sum_lanes<F>(sum);
}

// Which weights of a row survive dropout: bits for every 64 keys.
class Dropout {
 public:
  explicit Dropout(const CrossAttention& s)
      : keys_(s.seed), threshold_(uint32_t(s.dropout_p * 4294967296.0)), blocks_(words(s.keys)) {}

  // 64-bit words for the keys of a block.
  static int64_t words(int64_t keys) { return (keys + kPhiloxBlock - 1) / kPhiloxBlock; }

  // For `rows` rows from `row` on, `ld` words apart.
  void draw(uint64_t* kept, int64_t ld, const KeyBlock& block, int64_t row, int64_t rows) const {
    const int rest = int(block.count % kPhiloxBlock);
    const bool short_rest = 0 < rest && rest <= 16;
    const int64_t whole = short_rest ? block.count / kPhiloxBlock : words(block.count);
    const uint64_t first = uint64_t(row * blocks_ + block.first / kPhiloxBlock);
    for (int64_t r = 0; r < rows; ++r) random_bits(keys_, first + uint64_t(r * blocks_), whole, threshold_, kept + r * ld);
    if (short_rest) random_bits_of_rows(keys_, first + uint64_t(whole), blocks_, rows, rest, threshold_, kept + whole, ld);
  }

 private:
  PhiloxKeys keys_;
  uint32_t threshold_;
  int64_t blocks_;
};

// The vector of a row that starts at column j, without the dropped keys.
template <class F>
inline Vec<F> without_dropped(const uint64_t* kept, int64_t j, Vec<F> x) {
  return where_set<F>(kept[j / kPhiloxBlock] >> (j % kPhiloxBlock), x);
}

// row = factor * row where the key survives, else 0.
template <class F>
inline void drop_row(F* row, int64_t padded, const uint64_t* kept, F factor) {
  for (int64_t j = 0; j < padded; j += kLanes<F>)
    store<F>(row + j, without_dropped<F>(kept, j, load(row + j) * broadcast(factor)));
}

// The weights of a row whose sum is known to matter only up to `count` columns: x[v] = 0 beyond.
template <class F, int n>
inline void zero_beyond(int64_t count, int64_t j, Vec<F> (&x)[n]) {
  if (j + n * kLanes<F> <= count) return;
  IUMAD_UNROLL for (int v = 0; v < n; ++v) x[v] = first_lanes<F>(count - j - v * kLanes<F>) ? x[v] : Vec<F>{};
}

// Largest squared length of a row of a block. NaN counts as 0.
template <class T>
inline float largest_square(const T* block, int64_t ld, int64_t rows, int64_t columns) {
  using F = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int n = kLanes<F>;
  Vec<F> largest{};
  for (int64_t i = 0; i < rows; i += n) {
    Vec<F> square[n];
    IUMAD_UNROLL for (int r = 0; r < n; ++r) {
      const T* row = block + (i + r < rows ? i + r : i) * ld;
      Vec<F> sum{};
      for (int64_t j = 0; j < columns; j += n) sum = fma(load_lanes(row + j), load_lanes(row + j), sum);
      square[r] = sum;
    }
    const Vec<F> sum = sum_rows<F>(square);
    largest = sum > largest ? sum : largest;
  }
  return float(max_lanes<F>(largest));
}

}  // namespace iumad::IUMAD_ISA
