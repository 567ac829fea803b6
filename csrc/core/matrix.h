// Products of matrix blocks that live in the cache: C[m][n] (+)= sum_k A[m][k] B[k][n], in float or double.
//
// `Dense` is one of two ways to hold the operands; `Bf16Pairs` (matrix_bf16.h) is the other, for CPUs that multiply bfloat16
// matrices. A kernel written against this interface works with both:
//
//   Operand       element type of the blocks: load_rows<Operand> makes them
//   kStep         columns of every block are allocated and zero-filled up to a multiple of this, rows up to one of kRowStep
//   kTileRows     a number of rows that divides into whole register tiles
//   kFreeColumns  whether left_from_columns reads the block itself, so that scores can be a left operand by columns too
//   Left, Right   an operand in the form in which `multiply` reads it; *_from_* make one out of a block, into a buffer of `size`
//                 elements where the form differs (Dense reads the block itself and leaves the buffer alone)
//   prefetcher    is told of the work done, in multiplications, tile by tile
//   finish        what `multiply` does to the sums before it stores them: finish(i, j, x) has the vectors x[0], x[1], ... of
//                 row i from column j on, in registers, and changes them in place
#pragma once

#include "rows.h"

namespace iumad::IUMAD_ISA {

struct AsIs {
  template <class V, int n>
  void operator()(int64_t, int64_t, V (&)[n]) const {}
};

// What a register tile does with a unit of A, broadcast, and a vector of units of B. Here a unit is a number.
template <class F>
struct MultiplyAdd {
  using Unit = F;
  static constexpr int kTerms = 1;  // products of numbers per unit
  static Vec<F> add(Vec<F> a, Vec<F> b, Vec<F> sum) { return fma(a, b, sum); }
};

// Products of blocks whose sums live in registers, of operands by unit: a block of A in any strides, vectors of a row of B. C
// holds numbers of any type, sums that are accumulated of the compute type.
template <class Product>
class RegisterTiles {
  using F = typename Product::Unit;
  using V = Vec<F>;

 public:
  struct Left {
    const F* data;
    int64_t row, depth;  // strides
    Left from_depth(int64_t k) const { return {data + k * depth, row, depth}; }
  };
  struct Right {
    const F* data;
    int64_t depth;  // stride
    Right from_depth(int64_t k) const { return {data + k * depth, depth}; }
  };

  // n is rounded up to whole vectors, `depth` counts units.
  template <class C, class Finish>
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, C* c, int64_t ldc, bool accumulate,
                       Prefetcher& prefetcher, const Finish& finish) {
    const int64_t depth_block = n <= 2 * kLanes<F> ? 256 : 128;  // keeps the panel of B that a column of tiles shares near
    if constexpr (std::is_same_v<C, F>) {
      for (; depth > depth_block; depth -= depth_block) {
        multiply_part(m, n, depth_block, a, b, c, ldc, accumulate, prefetcher, AsIs{});
        a = a.from_depth(depth_block), b = b.from_depth(depth_block);
        accumulate = true;
      }
    }
    multiply_part(m, n, depth, a, b, c, ldc, accumulate, prefetcher, finish);
  }

 private:
  static constexpr int kMaxVectors = kVectorBytes == 64 ? 4 : 2;

  template <class C, class Finish>
  static void multiply_part(int64_t m, int64_t n, int64_t depth, Left a, Right b, C* c, int64_t ldc, bool accumulate,
                            Prefetcher& prefetcher, const Finish& finish) {
    const int64_t vectors = (n + kLanes<F> - 1) / kLanes<F>, panels = (vectors + kMaxVectors - 1) / kMaxVectors;
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t first = vectors * panel / panels, count = vectors * (panel + 1) / panels - first, j = first * kLanes<F>;
      const auto run = [&](auto width) {
        constexpr int kVectors = decltype(width)::value;
        multiply_panel<kVectors>(m, depth, a, b.data + j, b.depth, c, ldc, accumulate, j, prefetcher, finish);
      };
      if (count == 1) run(std::integral_constant<int, 1>{});
      if (count == 2) run(std::integral_constant<int, 2>{});
      if constexpr (kMaxVectors == 4) {
        if (count == 3) run(std::integral_constant<int, 3>{});
        if (count == 4) run(std::integral_constant<int, 4>{});
      }
    }
  }

  template <int kVectors, class C, class Finish>
  static void multiply_panel(int64_t m, int64_t depth, Left a, const F* b, int64_t ldb, C* c, int64_t ldc, bool accumulate,
                             int64_t j, Prefetcher& prefetcher, const Finish& finish) {
    constexpr int kRows = (kVectorBytes == 64 ? 24 : 12) / (kVectors == 1 ? 2 : kVectors);
    int64_t i = 0;
    const auto run = [&](auto rows) {
      constexpr int kTile = decltype(rows)::value;
      for (; i + kTile <= m; i += kTile) {
        multiply_tile<kTile, kVectors>(depth, a.data + i * a.row, a.row, a.depth, b, ldb, c + i * ldc + j, ldc, accumulate, i, j,
                                       finish);
        prefetcher.step(kTile * kVectors * kLanes<F> * depth * Product::kTerms);
      }
    };
    run(std::integral_constant<int, kRows>{});
    run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 1>{});
  }

  // A tile of kRows x (kVectors vectors) of C, held in registers for the whole depth. i, j: its place in C, for `finish`.
  // Flattened: one call that stays a call inside the loops would put all sums in memory.
  template <int kRows, int kVectors, class C, class Finish>
  [[gnu::flatten]] static void multiply_tile(int64_t depth, const F* a, int64_t a_row, int64_t a_depth, const F* b, int64_t ldb,
                                             C* c, int64_t ldc, bool accumulate, int64_t i, int64_t j, const Finish& finish) {
    V sum[kRows][kVectors] = {};
    // The pointer to a row is a new value at every row: the compiler would keep kRows of them at once, in vector registers.
    C* row = c;
    const auto next = [&] {
      row += ldc;
      asm("" : "+r"(row));
    };
    if constexpr (std::is_same_v<C, F>) {
      if (accumulate) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[r][v] = load(row + v * kLanes<F>);
          next();
        }
      }
    }

    // Three rows share a pointer (address = pointer + {0, 1, 2} strides), else the pointers do not fit the integer registers.
    constexpr int kPointers = (kRows + 2) / 3;
    const char* left[kPointers];
    const int64_t row_bytes = a_row * int64_t(sizeof(F)), depth_bytes = a_depth * int64_t(sizeof(F));
    for (int p = 0; p < kPointers; ++p) left[p] = reinterpret_cast<const char*>(a) + 3 * p * row_bytes;
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      V right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<F>);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        F unit;
        std::memcpy(&unit, left[r / 3] + r % 3 * row_bytes, sizeof unit);
        const V value = broadcast(unit);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = Product::add(value, right[v], sum[r][v]);
      }
      b += ldb;
#pragma GCC unroll 8
      for (int p = 0; p < kPointers; ++p) left[p] += depth_bytes;
    }

    row = c;
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      finish(i + r, j, sum[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store_lanes(row + v * kLanes<F>, sum[r][v]);
      next();
    }
  }
};

template <class F>
struct Dense {
  using Compute = F;
  using Operand = F;
  using Tiles = RegisterTiles<MultiplyAdd<F>>;
  using Left = typename Tiles::Left;
  using Right = typename Tiles::Right;
  static constexpr int64_t kStep = kLanes<F>, kRowStep = 4, kTileRows = 24;
  static constexpr bool kFreeColumns = true;

  // Nothing to set up for the thread that multiplies.
  struct Session {};

  static int64_t buffer_size(int64_t, int64_t) { return 0; }
  static int64_t transposed_size(int64_t depth, int64_t columns) { return depth * row_length<F>(columns); }

  static Left left_from_rows(const F* block, int64_t ld) { return {block, ld, 1}; }
  // block[k][m], read as A[m][k].
  static Left left_from_columns(const F* block, int64_t ld, int64_t, int64_t, F*) { return {block, 1, ld}; }
  static Left left_from_scores(const F* scores, int64_t ld, int64_t, int64_t, F*) { return {scores, ld, 1}; }
  // Where `multiply` may store scores that become a Left by left_from_rows.
  static F* rows_of_left(F* scores, F*) { return scores; }
  static int64_t row_length_of_left(int64_t columns) { return row_length<F>(columns); }
  static Right right_from_rows(const F* block, int64_t ld, int64_t, int64_t, F*) { return {block, ld}; }
  static Right right_from_scores(const F* scores, int64_t ld, int64_t, int64_t, F*) { return {scores, ld}; }
  // block[n][k], read as B[k][n].
  static Right right_from_columns(const F* block, int64_t ld, int64_t columns, int64_t depth, F* buffer) {
    const int64_t ldb = row_length<F>(columns);
    transpose_rows(buffer, ldb, block, ld, columns, depth);
    return {buffer, ldb};
  }

  template <class Finish = AsIs>
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, F* c, int64_t ldc, bool accumulate,
                       Prefetcher& prefetcher, const Finish& finish = {}) {
    Tiles::multiply(m, n, depth, a, b, c, ldc, accumulate, prefetcher, finish);
  }
};

}  // namespace iumad::IUMAD_ISA
