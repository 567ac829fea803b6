// The order in which a scan visits the pixels of a rows x columns grid. A length-L sequence is the grid 1 x L.
//
// A direction is a walk of two nested loops: `inner` tokens one inner step apart, then one outer step. Kernels, on the CPU and on
// the GPU, turn a token number into a pixel with these few integers, so no input is ever copied, flipped or padded.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define IUMAD_HOST_DEVICE __host__ __device__
#else
#define IUMAD_HOST_DEVICE
#endif

namespace iumad {

enum class ScanScheme : int64_t {
  kRow = 0,            // one direction, row by row
  kRowReverse = 1,     // the same from the last pixel to the first
  kBidirectional = 2,  // kRow and kRowReverse
  kCross = 3,          // VMamba: rows, columns, and both reversed
  kEs2d = 4,           // EfficientVMamba: step x step interleaved sub-grids; even ones by rows, odd ones by columns
};

struct ScanDirection {
  int64_t length, inner;  // tokens in all; tokens of one inner loop
  int64_t row, column;    // the first pixel
  int64_t inner_row, inner_column, outer_row, outer_column;

  IUMAD_HOST_DEVICE void pixel(int64_t token, int64_t* r, int64_t* c) const {
    const int64_t o = token / inner, i = token % inner;
    *r = row + o * outer_row + i * inner_row;
    *c = column + o * outer_column + i * inner_column;
  }

  // The token at a pixel of the grid, or -1 where this direction does not pass (es2d).
  IUMAD_HOST_DEVICE int64_t token(int64_t r, int64_t c) const {
    const int64_t step = inner_row + inner_column;  // one of them is 0; an outer step is as long
    if ((r - row) % step != 0 || (c - column) % step != 0) return -1;
    const int64_t rows_on = (r - row) / step, columns_on = (c - column) / step;
    return inner_row != 0 ? columns_on * inner + rows_on : rows_on * inner + columns_on;
  }
};

struct ScanOrder {
  ScanScheme scheme;
  int64_t step;  // es2d only
  int64_t rows, columns;

  IUMAD_HOST_DEVICE int64_t directions() const {
    switch (scheme) {
      case ScanScheme::kBidirectional:
        return 2;
      case ScanScheme::kCross:
        return 4;
      case ScanScheme::kEs2d:
        return step * step;
      default:
        return 1;
    }
  }

  // Whether several directions visit the same pixel (otherwise each pixel has exactly one).
  IUMAD_HOST_DEVICE bool overlaps() const { return scheme == ScanScheme::kBidirectional || scheme == ScanScheme::kCross; }

  IUMAD_HOST_DEVICE int64_t max_length() const {
    if (scheme != ScanScheme::kEs2d) return rows * columns;
    return ((rows + step - 1) / step) * ((columns + step - 1) / step);
  }

  IUMAD_HOST_DEVICE ScanDirection direction(int64_t k) const {
    // Sub-grid of step p: the pixels (i, j) + p * (0..., 0...). All schemes but es2d have the one sub-grid p = 1.
    const bool es2d = scheme == ScanScheme::kEs2d;
    const int64_t p = es2d ? step : 1;
    // es2d counts sub-grids as the four of the paper for p = 2: (0,0) rows, (1,0) columns, (0,1) rows, (1,1) columns.
    const int64_t i = es2d ? k % p : 0, j = es2d ? k / p : 0;
    const bool by_column = es2d ? k % 2 == 1 : (scheme == ScanScheme::kCross && k % 2 == 1);
    const bool reversed = scheme == ScanScheme::kRowReverse || (scheme == ScanScheme::kBidirectional && k == 1) ||
                          (scheme == ScanScheme::kCross && k >= 2);
    const int64_t r = rows > i ? (rows - i + p - 1) / p : 0, c = columns > j ? (columns - j + p - 1) / p : 0;
    ScanDirection d;
    d.length = r * c;
    d.inner = by_column ? r : c;
    const int64_t sign = reversed ? -p : p;
    d.row = reversed ? i + (r - 1) * p : i;
    d.column = reversed ? j + (c - 1) * p : j;
    d.inner_row = by_column ? sign : 0;
    d.inner_column = by_column ? 0 : sign;
    d.outer_row = by_column ? 0 : sign;
    d.outer_column = by_column ? sign : 0;
    return d;
  }
};

}  // namespace iumad
