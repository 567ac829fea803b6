// Depthwise convolution + bias + SiLU, forward and backward, over grids and (as a grid of one row) over sequences:
//
//   z(r, c)   = bias + sum_{i, j} weight(i, j) x(r stride + i - pad_top, c stride + j - pad_left)       out = z or silu(z)
//   dz        = dout or dout silu'(z)                    dbias = sum dz         dweight(i, j) = sum_{r, c} dz(r, c) x(...)
//   dx(p, q)  = sum_{i, j} weight(i, j) dz((p + pad_top - i) / stride, (q + pad_left - j) / stride)     where these are whole
//
// x is zero outside of the image, but the columns left of the first one can be given (history: the state a causal convolution
// carries from one call to the next). With `sequence` numbers, a tap counts only where its token has the number of the token
// it contributes to, and outputs of negative numbers are 0 (packed sequences, padding).
//
// Forward keeps nothing: backward computes z again. Sums run in float (double for double tensors), in an order that depends on
// the shapes alone.
#pragma once

#include <cstdint>

#include "dispatch.h"
#include "dtype.h"

namespace iumad {

// Strides are in elements.
struct GridView {  // (batch, channel, row, column)
  void* data;
  DType dtype;
  int64_t batch, channel, row, column;
};

struct DepthwiseConv2d {
  int64_t batch, channels, height, width;
  int64_t kernel_height, kernel_width, stride, pad_top, pad_left;
  bool silu, is_double;
  GridView x, out;          // out: (batch, channels, out_height, out_width)
  GridView weight;          // (0, channel, row, column)
  GridView bias;            // (0, channel, 0, 0); data may be null
  GridView history;         // (batch, channel, 0, column), pad_left columns; data may be null
  const int32_t* sequence;  // (batch, width), contiguous, for a grid of one row; may be null

  int64_t out_height() const { return (height + stride - 1) / stride; }
  int64_t out_width() const { return (width + stride - 1) / stride; }
  int64_t history_columns() const { return history.data ? pad_left : 0; }
};

struct DepthwiseConv2dGradients {
  GridView out;         // gradient of the output
  GridView x, history;  // results
  void *weight, *bias;  // (parts, channels, kernel_height, kernel_width) and (parts, channels), compute type: to be added up over
                        // the parts; bias may be null
};

struct DepthwiseConv2dKernels {
  // The work is a number of independent tasks; any split of [0, tasks) over any threads gives the same bits.
  int64_t (*forward_tasks)(const DepthwiseConv2d&);
  void (*forward)(const DepthwiseConv2d&, int64_t begin, int64_t end);
  int64_t (*backward_parts)(const DepthwiseConv2d&);
  int64_t (*backward_tasks)(const DepthwiseConv2d&);
  void (*backward)(const DepthwiseConv2d&, const DepthwiseConv2dGradients&, int64_t begin, int64_t end);
};

IUMAD_DECLARE_KERNELS(DepthwiseConv2dKernels, depthwise_conv2d)

}  // namespace iumad
