// Products of matrix blocks that live in the cache: C[m][n] (+)= sum_k A[m][k] B[k][n], in float or double.
//
// `Dense` is one of two ways to hold the operands; `Bf16Pairs` (matrix_bf16.h) is the other, for CPUs that multiply bfloat16
// matrices. A kernel written against this interface works with both:
//
//   Operand       element type of the blocks: load_rows<Operand> makes them
//   kStep         rows and columns of every block are allocated and zero-filled up to a multiple of this
//   Left, Right   an operand in the form in which `multiply` reads it; *_from_* make one out of a block, into a buffer of `size`
//                 elements where the form differs (Dense reads the block itself and leaves the buffer alone)
#pragma once

#include "rows.h"

namespace iumad::IUMAD_ISA {

namespace detail {

// A tile of kRows x (kVectors vectors) of C, held in registers for the whole depth.
template <class F, int kRows, int kVectors>
inline void multiply_tile(int64_t depth, const F* a, int64_t a_row, int64_t a_depth, const F* b, int64_t ldb, F* c, int64_t ldc,
                          bool accumulate) {
  using V = Vec<F>;
  V sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = accumulate ? load(c + r * ldc + v * kLanes<F>) : V{};

  // Three rows share a pointer (address = pointer + {0, 1, 2} strides), else the pointers do not fit the integer registers.
  constexpr int kPointers = (kRows + 2) / 3;
  const char* left[kPointers];
  for (int i = 0; i < kPointers; ++i) left[i] = reinterpret_cast<const char*>(a + 3 * i * a_row);
  const int64_t row_bytes = a_row * int64_t(sizeof(F)), depth_bytes = a_depth * int64_t(sizeof(F));
  for (int64_t k = 0; k < depth; ++k) {
    V right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<F>);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V value = broadcast(*reinterpret_cast<const F*>(left[r / 3] + r % 3 * row_bytes));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(value, right[v], sum[r][v]);
    }
    b += ldb;
#pragma GCC unroll 8
    for (int i = 0; i < kPointers; ++i) left[i] += depth_bytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store<F>(c + r * ldc + v * kLanes<F>, sum[r][v]);
}

}  // namespace detail

template <class F>
struct Dense {
  using Compute = F;
  using Operand = F;
  static constexpr int64_t kStep = kLanes<F>;

  struct Left {
    const F* data;
    int64_t row, depth;  // strides
    Left from_depth(int64_t k) const { return {data + k * depth, row, depth}; }
  };
  struct Right {
    const F* data;
    int64_t depth;  // stride
  };

  // Nothing to set up for the thread that multiplies.
  struct Session {};

  static int64_t buffer_size(int64_t, int64_t) { return 0; }
  static int64_t transposed_size(int64_t depth, int64_t columns) { return depth * row_length<F>(columns); }

  static Left left_from_rows(const F* block, int64_t ld) { return {block, ld, 1}; }
  // block[k][m], read as A[m][k].
  static Left left_from_columns(const F* block, int64_t ld, int64_t, int64_t, F*) { return {block, 1, ld}; }
  static Left left_from_scores(const F* scores, int64_t ld, int64_t, int64_t, F*) { return {scores, ld, 1}; }
  static Right right_from_rows(const F* block, int64_t ld, int64_t, int64_t, F*) { return {block, ld}; }
  static Right right_from_scores(const F* scores, int64_t ld, int64_t, int64_t, F*) { return {scores, ld}; }
  // block[n][k], read as B[k][n].
  static Right right_from_columns(const F* block, int64_t ld, int64_t columns, int64_t depth, F* buffer) {
    const int64_t ldb = row_length<F>(columns);
    transpose_rows(buffer, ldb, block, ld, columns, depth);
    return {buffer, ldb};
  }

  // n is rounded up to whole vectors.
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, F* c, int64_t ldc, bool accumulate) {
    constexpr int kMaxVectors = kVectorBytes == 64 ? 4 : 2;
    constexpr int64_t kDepthBlock = 128;  // keeps the panel of B that a column of tiles shares in the first-level cache
    const int64_t vectors = (n + kStep - 1) / kStep, panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    if (depth == 0 && !accumulate)
      for (int64_t i = 0; i < m; ++i) std::memset(c + i * ldc, 0, size_t(vectors * kStep) * sizeof(F));
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      const int64_t part = depth - k < kDepthBlock ? depth - k : kDepthBlock;
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t first = vectors * panel / panels, count = vectors * (panel + 1) / panels - first;
        const auto run = [&](auto width) {
          constexpr int kVectors = decltype(width)::value;
          multiply_panel<kVectors>(m, part, a.data + k * a.depth, a, b.data + k * b.depth + first * kStep, b.depth,
                                   c + first * kStep, ldc, accumulate || k > 0);
        };
        if (count == 1) run(std::integral_constant<int, 1>{});
        if (count == 2) run(std::integral_constant<int, 2>{});
        if constexpr (kMaxVectors == 4) {
          if (count == 3) run(std::integral_constant<int, 3>{});
          if (count == 4) run(std::integral_constant<int, 4>{});
        }
      }
    }
  }

 private:
  template <int kVectors>
  static void multiply_panel(int64_t m, int64_t depth, const F* a, Left left, const F* b, int64_t ldb, F* c, int64_t ldc,
                             bool accumulate) {
    constexpr int kRows = (kVectorBytes == 64 ? 24 : 12) / (kVectors == 1 ? 2 : kVectors);
    int64_t i = 0;
    const auto run = [&](auto rows) {
      constexpr int kTile = decltype(rows)::value;
      for (; i + kTile <= m; i += kTile)
        detail::multiply_tile<F, kTile, kVectors>(depth, a + i * left.row, left.row, left.depth, b, ldb, c + i * ldc, ldc,
                                                  accumulate);
    };
    run(std::integral_constant<int, kRows>{});
    run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 1>{});
  }
};

}  // namespace iumad::IUMAD_ISA
