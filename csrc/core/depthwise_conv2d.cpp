#include "depthwise_conv2d.h"

#include "conv_block.h"
#include "conv_tokens.h"
#include "silu.h"

namespace iumad::IUMAD_ISA {
namespace {

// Of the input, with a chunk's channels. Channels-last a tile shares the second-level cache with what becomes of it, and is as
// wide as it can be with kTileRows rows: memory is read in long stretches. In other layouts it stays in the first-level cache.
constexpr int64_t kTileBytes = int64_t(256) << 10, kTileRows = 8, kTransposedPixels = 256;
constexpr int64_t kTasksWanted = 64;  // of backward, so that many cores are busy although a task walks many tiles

// Bytes of channels taken together. Tensors used where they are: long stretches, for the hardware's prefetching, but not so
// long that backward's tiles leave the second-level cache (1 KiB was no faster forward). Others go through scratch: where
// channels are side by side still several cache lines at a time (single lines, a whole feature row apart, would wait for memory
// one by one), where pixels are as few as possible, so that a tile stays in the first-level cache.
constexpr int64_t kChunkInPlace = 512, kChunkStaged = 256, kChunkTransposed = kVectorBytes;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The outputs, cut into rectangles of nearly equal size.
struct Tiling {
  int64_t rows, columns, down, across;

  explicit Tiling(const DepthwiseConv2d& s) {
    const int64_t height = s.out_height(), width = s.out_width(), bytes = s.channels * (s.is_double ? 8 : 4);
    const int64_t inputs = s.x.channel == 1 ? kTileBytes / most(kVectorBytes, least(kChunkInPlace, bytes)) : kTransposedPixels;
    const int64_t outputs = inputs / (s.stride * s.stride);
    across = div_up(width, outputs / least(height, kTileRows / s.stride));
    columns = div_up(width, across);
    down = div_up(height, most(1, outputs / columns));
    rows = div_up(height, down);
  }
  int64_t count() const { return down * across; }
  // The most pixels a tile reads or writes of any tensor, forward and backward.
  int64_t input_pixels(const DepthwiseConv2d& s) const {
    return (rows * s.stride + s.kernel_height) * (columns * s.stride + s.kernel_width);
  }
  int64_t backward_pixels(const DepthwiseConv2d& s) const {
    return (rows * s.stride + 2 * s.kernel_height) * (columns * s.stride + s.history_columns() + 2 * s.kernel_width);
  }
  Rect tile(const DepthwiseConv2d& s, int64_t i) const {
    const int64_t row = i / across * rows, column = i % across * columns;
    return {row, column, least(rows, s.out_height() - row), least(columns, s.out_width() - column)};
  }
};

// The chunks of channels: whole vectors, as many as `bytes` hold, and a partial vector at the end.
template <class F>
struct Chunks {
  int64_t channels, size, whole;

  Chunks(const DepthwiseConv2d& s, bool in_place)
      : channels(s.channels),
        size((in_place           ? kChunkInPlace
              : s.x.channel == 1 ? kChunkStaged
                                 : kChunkTransposed) /
             sizeof(F)) {
    whole = channels / kLanes<F> * kLanes<F>;
  }
  int64_t count() const { return div_up(whole, size) + (whole < channels); }
  int64_t vectors() const { return div_up(least(size, channels), kLanes<F>); }
  Chunk chunk(int64_t batch, int64_t i) const {
    const int64_t first = least(i * size, whole);
    return {batch, first, first == whole ? channels - whole : least(size, whole - first)};
  }
};

Bounds image(const DepthwiseConv2d& s) { return {0, s.height, -s.history_columns(), s.width}; }

// The pixels of x, and of the history, that a rectangle of outputs reads.
Rect inputs_of(const DepthwiseConv2d& s, const Rect& r) {
  const Bounds in = image(s);
  const int64_t row = r.row * s.stride - s.pad_top, column = r.column * s.stride - s.pad_left;
  const int64_t top = most(row, in.top), left = most(column, in.left);
  return {top, left, least(row + (r.rows - 1) * s.stride + s.kernel_height, in.bottom) - top,
          least(column + (r.columns - 1) * s.stride + s.kernel_width, in.right) - left};
}

int64_t taps_of(const DepthwiseConv2d& s) { return s.kernel_height * s.kernel_width; }

// The inputs p = m stride + tap - pad, m in [begin, end), in one direction: they meet the taps tap, tap + stride, ... and no
// others.
struct Phase {
  int64_t tap, taps, begin, end;

  Phase(int64_t tap, int64_t stride, int64_t pad, int64_t kernel, int64_t first, int64_t count)
      : tap(tap),
        taps(div_up(most(0, kernel - tap), stride)),
        begin(div_up(first + pad - tap, stride)),
        end(div_up(first + count + pad - tap, stride)) {}
};

// Calls f(rows, columns) for the phases of a rectangle of inputs.
template <class Visitor>
void for_phases(const DepthwiseConv2d& s, const Rect& inputs, Visitor&& f) {
  for (int64_t i = 0; i < s.stride; ++i)
    for (int64_t j = 0; j < s.stride; ++j)
      f(Phase(i, s.stride, s.pad_top, s.kernel_height, inputs.row, inputs.rows),
        Phase(j, s.stride, s.pad_left, s.kernel_width, inputs.column, inputs.columns));
}

// The filters and biases of channels [first, first + count) as lanes: [vector][tap][lane], [vector][lane].
template <class F>
struct Filters {
  static constexpr int V = kLanes<F>;
  int64_t taps;
  Scratch memory;
  F *weight, *bias;
  F* phased;                // the weights, phase after phase, each turned around: as the gradient of the inputs needs them
  int64_t *order, *offset;  // which tap is where in `phased`; room for the taps' offsets

  Filters(const DepthwiseConv2d& s, int64_t first, int64_t count)
      : taps(taps_of(s)),
        memory(2 * Scratch::bytes<F>((count + V) * taps) + Scratch::bytes<F>(count + V) + 2 * Scratch::bytes<int64_t>(taps)) {
    weight = memory.take<F>((count + V) * taps);
    phased = memory.take<F>((count + V) * taps);
    bias = memory.take<F>(count + V);
    order = memory.take<int64_t>(taps);
    offset = memory.take<int64_t>(taps);
    int64_t* next = order;
    for_phases(s, {}, [&](const Phase& rows, const Phase& columns) {
      for (int64_t i = rows.taps - 1; i >= 0; --i)
        for (int64_t j = columns.taps - 1; j >= 0; --j)
          *next++ = (rows.tap + i * s.stride) * s.kernel_width + columns.tap + j * s.stride;
    });
    for (int64_t c = 0; c < count; c += V) {
      const Chunk k = {0, first + c, least(V, s.channels - first - c)};
      F* w = weight + c * taps;
      load_rect<F>(w, 0, s.weight, k, {0, 0, s.kernel_height, s.kernel_width}, offset);
      for (int64_t i = 0; i < taps; ++i) store<F>(phased + c * taps + i * V, load(w + order[i] * V));
      clear_pixels(bias + c, 1);
      if (s.bias.data) load_rect<F>(bias + c, 0, s.bias, k, {0, 0, 1, 1}, offset);
    }
  }
};

// A tile's worth of pixels in scratch, [vector][pixel][lane].
template <class F>
struct Tile {
  int64_t plane;
  F* pixels;
  int64_t* offset;

  Tile(Scratch& memory, int64_t count, int64_t vectors)
      : plane(count * kLanes<F>), pixels(memory.take<F>(vectors * plane)), offset(memory.take<int64_t>(count)) {}
  static int64_t bytes(int64_t count, int64_t vectors) {
    return Scratch::bytes<F>(vectors * count * kLanes<F>) + Scratch::bytes<int64_t>(count);
  }

  // A tensor's pixels for reading: where they are, or copied here.
  Pixels<F> read(const GridView& v, const Chunk& k, const Rect& r) {
    if (in_place<F>(v) && k.whole<F>()) return tensor_pixels<F>(v, k);
    load_rect<F>(pixels, plane, v, k, r, offset);
    return in_scratch(pixels, plane, r);
  }
  // The same for x, before whose first column there may be a history.
  Pixels<F> read_x(const DepthwiseConv2d& s, const Chunk& k, const Rect& r) {
    if (r.column >= 0) return read(s.x, k, r);
    const int64_t before = -r.column;  // then the grid has one row
    load_rect<F>(pixels, plane, s.history, k, {0, s.pad_left - before, 1, before}, offset);
    load_rect<F>(pixels + before * kLanes<F>, plane, s.x, k, {0, 0, 1, r.columns - before}, offset);
    return in_scratch(pixels, plane, r);
  }
  // Where to write pixels of a tensor, and what to do when they are written.
  Pixels<F> write(const GridView& v, const Chunk& k, const Rect& r) {
    return in_place<F>(v) && k.whole<F>() ? tensor_pixels<F>(v, k) : in_scratch(pixels, plane, r);
  }
  void written(const GridView& v, const Chunk& k, const Rect& r) {
    if (!in_place<F>(v) || !k.whole<F>()) store_rect<F>(pixels, plane, v, k, r, offset);
  }
};

template <class F>
Chunks<F> forward_chunks(const DepthwiseConv2d& s) {
  return Chunks<F>(s, in_place<F>(s.x) && in_place<F>(s.out));
}

template <class F>
int64_t forward_tasks(const DepthwiseConv2d& s) {
  if (tokens_in_lanes(s)) return s.batch * s.channels;
  return s.batch * Tiling(s).count() * forward_chunks<F>(s).count();
}

template <class F, class K>
void forward(const DepthwiseConv2d& s, const K& kernel, int64_t begin, int64_t end) {
  const Tiling tiling(s);
  const Chunks<F> chunks = forward_chunks<F>(s);
  const int64_t pixels = tiling.input_pixels(s), vectors = chunks.vectors();
  Scratch memory(2 * Tile<F>::bytes(pixels, vectors));
  Tile<F> x_tile(memory, pixels, vectors), out_tile(memory, pixels, vectors);
  const Filters<F> filters(s, 0, s.channels);
  const bool far = are_far(s, 1, 1);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t item = task / chunks.count();
    const Chunk k = chunks.chunk(item / tiling.count(), task % chunks.count());
    const Rect tile = tiling.tile(s, item % tiling.count());
    const Pixels<F> x = x_tile.read_x(s, k, inputs_of(s, tile)), out = out_tile.write(s.out, k, tile);
    const int64_t further = ahead(out, tile, K::kBlockRows, K::kBlockColumns, far);
    with_taps(s, kernel, k.batch, [&](const auto& taps) {
      convolve<F>(x, image(s), kernel, s.pad_top, s.pad_left, filters.weight + k.channel * filters.taps, filters.bias + k.channel,
                  tile, k.vectors<F>(), far, taps, [&, gated = s.silu](int64_t r, int64_t c, int n, const F* z, auto run) {
                    constexpr int kRun = decltype(run)::value;
                    F* p = out.at(r, c) + n * out.vector;
                    fetch_run<kRun, 1>(p + further, out.column);
                    if (gated) {
                      silu<F, kRun>(z, p, out.column);
                    } else {
                      IUMAD_UNROLL for (int t = 0; t < kRun; ++t) store<F>(p + t * out.column, load(z + t * kLanes<F>));
                    }
                    for (int t = 0; t < kRun; ++t)
                      if (taps.skipped(c + t)) store<F>(p + t * out.column, Vec<F>{});
                  });
    });
    out_tile.written(s.out, k, tile);
  }
}

// ---- backward
// ------------------------------------------------------------------------------------------------------------------

// A tile of backward: the outputs whose share of dweight it adds up, the inputs whose gradient it writes, and the outputs that
// reach these inputs.
struct BackwardTile {
  Rect outputs, inputs, reaching;

  BackwardTile(const DepthwiseConv2d& s, const Rect& tile) : outputs(tile) {
    const int64_t history = tile.column == 0 ? s.history_columns() : 0;
    inputs = {tile.row * s.stride, tile.column * s.stride - history, 0, 0};
    inputs.rows = least((tile.row + tile.rows) * s.stride, s.height) - inputs.row;
    inputs.columns = least((tile.column + tile.columns) * s.stride, s.width) - inputs.column;
    const auto reach = [&](int64_t first, int64_t count, int64_t pad, int64_t kernel, int64_t out, int64_t* from, int64_t* size) {
      *from = div_up(most(0, first + pad - (kernel - 1)), s.stride);
      *size = least((first + count - 1 + pad) / s.stride + 1, out) - *from;
    };
    reach(inputs.row, inputs.rows, s.pad_top, s.kernel_height, s.out_height(), &reaching.row, &reaching.rows);
    reach(inputs.column, inputs.columns, s.pad_left, s.kernel_width, s.out_width(), &reaching.column, &reaching.columns);
  }
};

template <class F>
Chunks<F> backward_chunks(const DepthwiseConv2d& s) {
  return Chunks<F>(s, in_place<F>(s.x));  // its gradient has its layout
}

template <class F>
int64_t backward_parts(const DepthwiseConv2d& s) {
  if (tokens_in_lanes(s)) return least(s.batch, div_up(kTasksWanted, s.channels));
  return least(s.batch * Tiling(s).count(), div_up(kTasksWanted, backward_chunks<F>(s).count()));
}

template <class F>
int64_t backward_tasks(const DepthwiseConv2d& s) {
  if (tokens_in_lanes(s)) return s.channels * backward_parts<F>(s);
  return backward_chunks<F>(s).count() * backward_parts<F>(s);
}

// dz of the outputs that reach a tile.
template <class F, class K, class Taps>
Pixels<F> output_gradient(const DepthwiseConv2d& s, const Rect& out, const Chunk& k, const K& kernel, const Taps& taps,
                          const Pixels<F>& x, const Pixels<F>& dout, const Filters<F>& filters, Tile<F>& tile) {
  const Pixels<F> dz = in_scratch(tile.pixels, tile.plane, out);
  const int vectors = k.vectors<F>();
  const bool far = are_far(s, 2, 1);
  const int64_t further = ahead(dout, out, K::kBlockRows, K::kBlockColumns, far);
  const auto skip = [&](F* to, int64_t c, int count) {
    for (int t = 0; t < count; ++t)
      if (taps.skipped(c + t)) store<F>(to + t * dz.column, Vec<F>{});
  };
  if (s.silu) {
    convolve<F>(x, image(s), kernel, s.pad_top, s.pad_left, filters.weight, filters.bias, out, vectors, far, taps,
                [&](int64_t r, int64_t c, int n, const F* z, auto run) {
                  constexpr int kRun = decltype(run)::value;
                  const F* from = dout.at(r, c) + n * dout.vector;
                  F* to = dz.at(r, c) + n * dz.vector;
                  fetch_run<kRun, 0>(from + further, dout.column);
                  differentiate_silu<F, kRun>(z, from, dout.column, to, dz.column);
                  skip(to, c, kRun);
                });
  } else {
    for (int64_t r = out.row; r < out.row + out.rows; ++r) {
      for (int n = 0; n < vectors; ++n) {
        const F* from = dout.at(r, out.column) + n * dout.vector;
        F* to = dz.at(r, out.column) + n * dz.vector;
        for (int64_t t = 0; t < out.columns; ++t) store<F>(to + t * dz.column, load(from + t * dout.column));
        skip(to, out.column, int(out.columns));
      }
    }
  }
  return dz;
}

template <class F>
void store_input_gradient(const DepthwiseConv2dGradients& d, const Chunk& k, const Rect& inputs, Tile<F>& tile) {
  if (inputs.column >= 0) return tile.written(d.x, k, inputs);
  const int64_t history = -inputs.column;
  store_rect<F>(tile.pixels, tile.plane, d.history, k, {0, 0, 1, history}, tile.offset);
  store_rect<F>(tile.pixels + history * kLanes<F>, tile.plane, d.x, k, {0, 0, 1, inputs.columns - history}, tile.offset);
}

// Every phase of the inputs sees the outputs as a convolution of stride 1 with its own taps.
template <int kRows, int kColumns, int kStep>
auto phase_kernel(const Kernel<kRows, kColumns, kStep>& kernel, const Phase& rows, const Phase& columns) {
  if constexpr (kStep == 1) {
    return kernel;
  } else {
    return Kernel<0, 0, 1>{rows.taps, columns.taps};
  }
}

// Writes dx of a tile's inputs; dweight, [vector][phased tap][lane], becomes their share of it.
template <class F, class K, class Taps>
void input_gradient(const DepthwiseConv2d& s, const BackwardTile& t, const Chunk& k, const K& kernel, const Taps& taps,
                    const Pixels<F>& dz, const Pixels<F>& x, const Filters<F>& filters, const Pixels<F>& dx, F* dweight) {
  const int64_t plane = filters.taps * kLanes<F>;
  const Rect& out = t.reaching;
  clear_pixels(dweight, k.vectors<F>() * filters.taps);
  int64_t first = 0;
  for_phases(s, t.inputs, [&](const Phase& rows, const Phase& columns) {
    const int64_t row = rows.tap - s.pad_top, column = columns.tap - s.pad_left;
    const Gradients<F> gradients = {dz,
                                    every(x, s.stride, row, column),
                                    every(dx, s.stride, row, column),
                                    {out.row, out.row + out.rows, out.column, out.column + out.columns},
                                    filters.phased + first,
                                    dweight + first,
                                    plane,
                                    column,
                                    ahead(every(dx, s.stride, row, column), t.inputs, 1, K::kBlockColumns, are_far(s, 2, 1))};
    differentiate(phase_kernel(kernel, rows, columns), gradients,
                  {rows.begin, columns.begin, rows.end - rows.begin, columns.end - columns.begin}, k.vectors<F>(), taps);
    first += rows.taps * columns.taps * kLanes<F>;
  });
}

// total[vector][lane] += the sum of dz over a tile's own outputs.
template <class F>
void add_sums(const Pixels<F>& dz, const Rect& out, int vectors, F* total) {
  for (int n = 0; n < vectors; ++n) {
    Vec<F> sum{};
    for (int64_t r = out.row; r < out.row + out.rows; ++r) {
      const F* p = dz.at(r, out.column) + n * dz.vector;
      Vec<F> row{};
      for (int64_t c = 0; c < out.columns; ++c) row += load(p + c * dz.column);
      sum += row;
    }
    store<F>(total + n * kLanes<F>, load(total + n * kLanes<F>) + sum);
  }
}

template <class F, class K>
void backward(const DepthwiseConv2d& s, const DepthwiseConv2dGradients& d, const K& kernel, int64_t begin, int64_t end) {
  constexpr int V = kLanes<F>;
  const Tiling tiling(s);
  const Chunks<F> chunks = backward_chunks<F>(s);
  const int64_t items = s.batch * tiling.count(), parts = backward_parts<F>(s), taps_count = taps_of(s);
  const int64_t pixels = tiling.backward_pixels(s), vectors = chunks.vectors();
  Scratch memory(3 * Tile<F>::bytes(pixels, vectors) + 2 * Scratch::bytes<F>(vectors * V * taps_count) +
                 Scratch::bytes<F>(vectors * V));
  Tile<F> x_tile(memory, pixels, vectors), dout_tile(memory, pixels, vectors), dz_tile(memory, pixels, vectors);
  F *dweight = memory.take<F>(vectors * V * taps_count), *share = memory.take<F>(vectors * V * taps_count);
  F* dbias = memory.take<F>(vectors * V);
  for (int64_t task = begin; task < end;) {
    Chunk k = chunks.chunk(0, task / parts);
    const Filters<F> filters(s, k.channel, k.channels);
    for (const int64_t last = least(end, (task / parts + 1) * parts); task < last; ++task) {
      const int64_t part = task % parts;
      clear_pixels(dweight, vectors * taps_count);
      clear_pixels(dbias, vectors);
      for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
        k.batch = item / tiling.count();
        const BackwardTile t(s, tiling.tile(s, item % tiling.count()));
        const Pixels<F> x = x_tile.read_x(s, k, inputs_of(s, t.reaching)), dout = dout_tile.read(d.out, k, t.reaching);
        with_taps(s, kernel, k.batch, [&](const auto& taps) {
          const Pixels<F> dz = output_gradient<F>(s, t.reaching, k, kernel, taps, x, dout, filters, dz_tile);
          const Pixels<F> dx =
              t.inputs.column < 0 ? in_scratch(dout_tile.pixels, dout_tile.plane, t.inputs) : dout_tile.write(d.x, k, t.inputs);
          add_sums(dz, t.outputs, k.vectors<F>(), dbias);
          input_gradient<F>(s, t, k, kernel, taps, dz, x, filters, dx, share);
        });
        for (int64_t i = 0; i < k.vectors<F>() * taps_count; ++i)
          store<F>(dweight + i * V, load(dweight + i * V) + load(share + i * V));
        store_input_gradient<F>(d, k, t.inputs, dout_tile);
      }
      for (int n = 0; n < k.vectors<F>(); ++n)
        for (int64_t i = 0; i < taps_count; ++i)
          store<F>(share + (n * taps_count + filters.order[i]) * V, load(dweight + (n * taps_count + i) * V));
      k.batch = part;
      const DType compute = s.is_double ? DType::kFloat64 : DType::kFloat32;
      const GridView weight_parts = {d.weight, compute, s.channels * taps_count, taps_count, s.kernel_width, 1};
      const GridView bias_parts = {d.bias, compute, s.channels, 1, 0, 0};
      store_rect<F>(share, V * taps_count, weight_parts, k, {0, 0, s.kernel_height, s.kernel_width}, filters.offset);
      if (d.bias) store_rect<F>(dbias, V, bias_parts, k, {0, 0, 1, 1}, filters.offset);
    }
  }
}

int64_t forward_tasks_any(const DepthwiseConv2d& s) { return s.is_double ? forward_tasks<double>(s) : forward_tasks<float>(s); }
int64_t backward_parts_any(const DepthwiseConv2d& s) {
  return s.is_double ? backward_parts<double>(s) : backward_parts<float>(s);
}
int64_t backward_tasks_any(const DepthwiseConv2d& s) {
  return s.is_double ? backward_tasks<double>(s) : backward_tasks<float>(s);
}

void forward_any(const DepthwiseConv2d& s, int64_t begin, int64_t end) {
  if (tokens_in_lanes(s)) return s.is_double ? forward_tokens<double>(s, begin, end) : forward_tokens<float>(s, begin, end);
  if (s.is_double) {
    with_any_kernel(s, [&](const auto& kernel) { forward<double>(s, kernel, begin, end); });
  } else {
    with_kernel(s, [&](const auto& kernel) { forward<float>(s, kernel, begin, end); });
  }
}

void backward_any(const DepthwiseConv2d& s, const DepthwiseConv2dGradients& d, int64_t begin, int64_t end) {
  if (tokens_in_lanes(s)) {
    const int64_t parts = backward_parts_any(s);
    return s.is_double ? backward_tokens<double>(s, d, parts, begin, end) : backward_tokens<float>(s, d, parts, begin, end);
  }
  if (s.is_double) {
    with_any_kernel(s, [&](const auto& kernel) { backward<double>(s, d, kernel, begin, end); });
  } else {
    with_kernel(s, [&](const auto& kernel) { backward<float>(s, d, kernel, begin, end); });
  }
}

}  // namespace

extern const DepthwiseConv2dKernels depthwise_conv2d;
const DepthwiseConv2dKernels depthwise_conv2d = {forward_tasks_any, forward_any, backward_parts_any, backward_tasks_any,
                                                 backward_any};

}  // namespace iumad::IUMAD_ISA
