// Products of bfloat16 matrix blocks with float sums, for CPUs that have instructions for them: AMX tiles where this file is
// compiled for AMX, else the AVX512-BF16 dot product. The interface is that of Dense (matrix.h). Both read the same forms:
//
//   Left   A[m][k], rows of bfloat16            Right   B[k / 2][n] of 32-bit units, each holding B[k][n] and B[k + 1][n]
#pragma once

#if defined(__AVX512BF16__)

#include "matrix.h"

namespace iumad::IUMAD_ISA {

#if defined(__AMX_BF16__)
constexpr bool kAmx = true;
#else
constexpr bool kAmx = false;
#endif

struct Bf16Pairs {
  using Compute = float;
  using Operand = BFloat16;
  // kStep is the depth of an AMX tile, and twice its rows and columns: multiply takes 2 x 2.
  static constexpr int64_t kStep = 32, kRowStep = 32, kTileRows = kAmx ? 32 : 24;
  static constexpr bool kFreeColumns = false;

  struct Left {
    const BFloat16* data;
    int64_t row;  // stride
    Left from_depth(int64_t k) const { return {data + k, row}; }
  };
  struct Right {
    const uint32_t* data;
    int64_t depth;  // stride between pairs of k
  };

  // Tile registers are configured while a thread multiplies, and given back after.
  class Session {
   public:
#if defined(__AMX_BF16__)
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
#endif
  };

  static int64_t buffer_size(int64_t rows, int64_t columns) {
    return round_up(rows, kStep) * (row_length<uint16_t>(columns) + kStep);  // enough for either form
  }
  static int64_t transposed_size(int64_t depth, int64_t columns) { return buffer_size(depth, columns); }

  static Left left_from_rows(const BFloat16* block, int64_t ld) { return {block, ld}; }

  // block[k][m], read as A[m][k].
  static Left left_from_columns(const BFloat16* block, int64_t ld, int64_t depth, int64_t columns, BFloat16* buffer) {
    const int64_t lda = row_length<BFloat16>(depth);
    for (int64_t k = 0; k < depth; k += 32) {
      for (int64_t m = 0; m < columns; m += 16) {
        Vec<float> pair[16];
        for (int i = 0; i < 16; ++i) {
          const BFloat16* even = block + (k + 2 * i) * ld + m;
          pair[i] = (Vec<float>)interleave(load_half(even), load_half(even + ld));
        }
        transpose<float>(pair);
        for (int i = 0; i < 16; ++i) std::memcpy(buffer + (m + i) * lda + k, &pair[i], sizeof pair[i]);
      }
    }
    return {buffer, lda};
  }

  static BFloat16* rows_of_left(float*, BFloat16* buffer) { return buffer; }
  static int64_t row_length_of_left(int64_t columns) { return row_length<BFloat16>(columns); }

  static Left left_from_scores(const float* scores, int64_t ld, int64_t rows, int64_t columns, BFloat16* buffer) {
    const int64_t lda = row_length<BFloat16>(columns);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; j += 16)
        _mm256_storeu_si256((__m256i*)(buffer + i * lda + j), rounded(scores + i * ld + j));
    for (int64_t i = rows; i < round_up(rows, kStep); ++i)
      std::memset(static_cast<void*>(buffer + i * lda), 0, size_t(columns) * sizeof(BFloat16));
    return {buffer, lda};
  }

  static Right right_from_rows(const BFloat16* block, int64_t ld, int64_t depth, int64_t columns, BFloat16* buffer) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(buffer);
    const int64_t ldb = row_length<uint32_t>(columns);
    for (int64_t k = 0; k < depth; k += 2)
      for (int64_t j = 0; j < columns; j += 16) {
        const BFloat16* even = block + k * ld + j;
        _mm512_storeu_si512(pairs + k / 2 * ldb + j, interleave(load_half(even), load_half(even + ld)));
      }
    return {pairs, ldb};
  }

  static Right right_from_scores(const float* scores, int64_t ld, int64_t rows, int64_t columns, BFloat16* buffer) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(buffer);
    const int64_t ldb = row_length<uint32_t>(columns);
    for (int64_t k = 0; k < round_up(rows, kStep); k += 2)
      for (int64_t j = 0; j < columns; j += 16) {
        const float* even = scores + k * ld + j;
        const __m256i zero = _mm256_setzero_si256();
        _mm512_storeu_si512(pairs + k / 2 * ldb + j,
                            interleave(k < rows ? rounded(even) : zero, k + 1 < rows ? rounded(even + ld) : zero));
      }
    return {pairs, ldb};
  }

  // block[n][k], read as B[k][n]: a pair of k is one 32-bit unit of a row, so this is a plain transposition.
  static Right right_from_columns(const BFloat16* block, int64_t ld, int64_t columns, int64_t depth, BFloat16* buffer) {
    const int64_t ldb = row_length<uint32_t>(columns);
    transpose_rows(reinterpret_cast<float*>(buffer), ldb, reinterpret_cast<const float*>(block), ld / 2, columns, depth / 2);
    return {reinterpret_cast<const uint32_t*>(buffer), ldb};
  }

#if defined(__AMX_BF16__)
  // m, n and depth are rounded up to kStep: the operands are zero there.
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, float* c, int64_t ldc, bool accumulate,
                       Prefetcher& prefetcher) {
    depth = round_up(depth, kStep);
    for (int64_t j = 0; j < n; j += kStep)
      for (int64_t i = 0; i < m; i += kStep) {
        multiply_block(depth, a.data + i * a.row, a.row, b.data + j, b.depth, c + i * ldc + j, ldc, accumulate);
        prefetcher.step(kStep * kStep * depth);
      }
  }
  // The same for a C of float or BFloat16, by way of `finish`, and of m rows; C must not be accumulated.
  template <class C, class Finish>
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, C* c, int64_t ldc, bool, Prefetcher& prefetcher,
                       const Finish& finish) {
    alignas(64) float sum[kStep * kStep];
    depth = round_up(depth, kStep);
    for (int64_t j = 0; j < n; j += kStep)
      for (int64_t i = 0; i < m; i += kStep) {
        multiply_block(depth, a.data + i * a.row, a.row, b.data + j, b.depth, sum, kStep, false);
        const int64_t rows = m - i < kStep ? m - i : kStep;
        for (int64_t r = 0; r < rows; ++r) {
          Vec<float> x[2] = {load(sum + r * kStep), load(sum + r * kStep + 16)};
          finish(i + r, j, x);
          C* to = c + (i + r) * ldc + j;
          store_lanes(to, x[0]);
          store_lanes(to + 16, x[1]);
        }
        prefetcher.step(kStep * kStep * depth);
      }
  }

  static void multiply_block(int64_t depth, const BFloat16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                             bool accumulate) {
    const int64_t row_c = ldc * 4, row_a = lda * 2, row_b = ldb * 4;  // bytes
    if (accumulate) {
      _tile_loadd(0, c, row_c);
      _tile_loadd(1, c + 16, row_c);
      _tile_loadd(2, c + 16 * ldc, row_c);
      _tile_loadd(3, c + 16 * ldc + 16, row_c);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, row_a);
      _tile_loadd(5, a + 16 * lda + k, row_a);
      _tile_loadd(6, b + k / 2 * ldb, row_b);
      _tile_loadd(7, b + k / 2 * ldb + 16, row_b);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row_c);
    _tile_stored(1, c + 16, row_c);
    _tile_stored(2, c + 16 * ldc, row_c);
    _tile_stored(3, c + 16 * ldc + 16, row_c);
  }
#else
  // A unit is a pair of bfloat16.
  struct DotProducts {
    using Unit = float;
    static constexpr int kTerms = 2;
    static Vec<float> add(Vec<float> a, Vec<float> b, Vec<float> sum) {
      return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
  };

  // n is rounded up to whole vectors, depth to a whole pair: the operands are zero there.
  template <class C, class Finish = AsIs>
  static void multiply(int64_t m, int64_t n, int64_t depth, Left a, Right b, C* c, int64_t ldc, bool accumulate,
                       Prefetcher& prefetcher, const Finish& finish = {}) {
    using Tiles = RegisterTiles<DotProducts>;
    const typename Tiles::Left left = {reinterpret_cast<const float*>(a.data), a.row / 2, 1};
    const typename Tiles::Right right = {reinterpret_cast<const float*>(b.data), b.depth};
    Tiles::multiply(m, n, (depth + 1) / 2, left, right, c, ldc, accumulate, prefetcher, finish);
  }
#endif

 private:
  static __m256i load_half(const BFloat16* p) { return _mm256_loadu_si256((const __m256i*)p); }
  static __m256i rounded(const float* p) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p)); }
  static __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  }
};

}  // namespace iumad::IUMAD_ISA

#endif
