#include "depthwise_conv2d.h"

#include "conv_tile.h"

namespace iumad::IUMAD_ISA {
namespace {

constexpr int64_t kTileSide = 16, kTilePixels = 256;  // of the input: with a chunk's channels it fits the second-level cache
constexpr int64_t kTasksWanted = 64;                  // of backward, so that many cores are busy although a task walks many tiles

// Bytes of channels taken together. Tensors used where they are: long stretches, for the hardware's prefetching. Others go
// through scratch: where channels are side by side still several cache lines at a time (single lines, a whole feature row apart,
// would wait for memory one by one), where pixels are as few as possible, so that a tile stays in the first-level cache.
constexpr int64_t kChunkInPlace = 1024, kChunkStaged = 256, kChunkTransposed = kVectorBytes;

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The outputs, cut into rectangles of nearly equal size.
struct Tiling {
  int64_t rows, columns, down, across;

  explicit Tiling(const DepthwiseConv2d& s) {
    const int64_t height = s.out_height(), width = s.out_width();
    down = div_up(height, kTileSide / s.stride);
    rows = div_up(height, down);
    across = div_up(width, most(1, kTilePixels / (s.stride * s.stride) / rows));
    columns = div_up(width, across);
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
  int64_t vectors() const { return size / kLanes<F>; }
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

// The filters and biases of channels [first, first + count) as lanes: [vector][tap][lane], [vector][lane].
template <class F>
struct Filters {
  static constexpr int V = kLanes<F>;
  int64_t taps;
  Scratch memory;
  F *weight, *flipped, *bias;
  int64_t* offset;  // room for the taps' offsets

  Filters(const DepthwiseConv2d& s, int64_t first, int64_t count)
      : taps(taps_of(s)),
        memory(2 * Scratch::bytes<F>((count + V) * taps) + Scratch::bytes<F>(count + V) + Scratch::bytes<int64_t>(taps)) {
    weight = memory.take<F>((count + V) * taps);
    flipped = memory.take<F>((count + V) * taps);
    bias = memory.take<F>(count + V);
    offset = memory.take<int64_t>(taps);
    for (int64_t c = 0; c < count; c += V) {
      const Chunk k = {0, first + c, least(V, s.channels - first - c)};
      F* w = weight + c * taps;
      load_rect<F>(w, 0, s.weight, k, {0, 0, s.kernel_height, s.kernel_width}, offset);
      for (int64_t i = 0; i < taps; ++i) store<F>(flipped + c * taps + i * V, load(w + (taps - 1 - i) * V));
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
  for (int64_t task = begin; task < end; ++task) {
    const int64_t item = task / chunks.count();
    const Chunk k = chunks.chunk(item / tiling.count(), task % chunks.count());
    const Rect tile = tiling.tile(s, item % tiling.count());
    const Pixels<F> x = x_tile.read_x(s, k, inputs_of(s, tile)), out = out_tile.write(s.out, k, tile);
    with_taps(s, kernel, k.batch, [&](const auto& taps) {
      convolve<F>(
          x, image(s), kernel, s.pad_top, s.pad_left, filters.weight + k.channel * filters.taps, filters.bias + k.channel, tile,
          k.vectors<F>(), [&](int64_t c, int64_t j) { return taps(c, c * K::kStride - s.pad_left + j); },
          [&](int64_t r, int64_t c, int n, Vec<F> z) {
            if (taps.skipped(c)) z = Vec<F>{};
            store<F>(out.at(r, c) + n * out.vector, s.silu ? z * sigmoid<F>(z) : z);
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
  // The reaching outputs where they are `stride` apart, as the gradient of the inputs needs them.
  Rect spread(int64_t stride) const {
    return {reaching.row * stride, reaching.column * stride, (reaching.rows - 1) * stride + 1,
            (reaching.columns - 1) * stride + 1};
  }
};

template <class F>
Chunks<F> backward_chunks(const DepthwiseConv2d& s) {
  return Chunks<F>(s, in_place<F>(s.x));  // its gradient has its layout
}

template <class F>
int64_t backward_parts(const DepthwiseConv2d& s) {
  return least(s.batch * Tiling(s).count(), div_up(kTasksWanted, backward_chunks<F>(s).count()));
}

template <class F>
int64_t backward_tasks(const DepthwiseConv2d& s) {
  return backward_chunks<F>(s).count() * backward_parts<F>(s);
}

// dz of the outputs that reach a tile, `stride` apart in scratch with zeros between.
template <class F, class K, class Taps>
Pixels<F> spread_dz(const DepthwiseConv2d& s, const BackwardTile& t, const Chunk& k, const K& kernel, const Taps& taps,
                    const Pixels<F>& x, const Pixels<F>& dout, const Filters<F>& filters, Tile<F>& tile) {
  const Rect spread = t.spread(s.stride), &out = t.reaching;
  const Pixels<F> dz = in_scratch(tile.pixels, tile.plane, spread);
  const int vectors = k.vectors<F>();
  if (s.stride > 1)
    for (int n = 0; n < vectors; ++n) clear_pixels(tile.pixels + n * tile.plane, spread.pixels());
  const auto put = [&](int64_t r, int64_t c, int n, Vec<F> slope) {
    const Vec<F> g = load(dout.at(r, c) + n * dout.vector);
    store<F>(dz.at(r * K::kStride, c * K::kStride) + n * dz.vector, taps.skipped(c) ? Vec<F>{} : g * slope);
  };
  const Vec<F> one = broadcast(F(1));
  if (!s.silu) {
    for (int64_t r = out.row; r < out.row + out.rows; ++r)
      for (int64_t c = out.column; c < out.column + out.columns; ++c)
        for (int n = 0; n < vectors; ++n) put(r, c, n, one);
    return dz;
  }
  convolve<F>(
      x, image(s), kernel, s.pad_top, s.pad_left, filters.weight, filters.bias, out, vectors,
      [&](int64_t c, int64_t j) { return taps(c, c * K::kStride - s.pad_left + j); },
      [&](int64_t r, int64_t c, int n, Vec<F> z) {
        const Vec<F> gate = sigmoid<F>(z);
        put(r, c, n, gate * fma(z, one - gate, one));
      });
  return dz;
}

template <class F>
void store_input_gradient(const DepthwiseConv2dGradients& d, const Chunk& k, const Rect& inputs, Tile<F>& tile) {
  if (inputs.column >= 0) return tile.written(d.x, k, inputs);
  const int64_t history = -inputs.column;
  store_rect<F>(tile.pixels, tile.plane, d.history, k, {0, 0, 1, history}, tile.offset);
  store_rect<F>(tile.pixels + history * kLanes<F>, tile.plane, d.x, k, {0, 0, 1, inputs.columns - history}, tile.offset);
}

// The share of dweight and dbias of the outputs a tile owns, [vector][tap][lane] and [vector][lane], added to the totals.
template <class F, class K, class Taps>
void add_parameter_gradients(const DepthwiseConv2d& s, const Rect& out, const Chunk& k, const K& kernel, const Taps& taps,
                             const Pixels<F>& dz, const Pixels<F>& x, F* share, F* dweight, F* dbias) {
  constexpr int V = kLanes<F>;
  const int vectors = k.vectors<F>();
  const int64_t count = vectors * taps_of(s);
  clear_pixels(share, count);
  correlate<F>(
      dz, x, image(s), kernel, s.pad_top, s.pad_left, out, vectors,
      [&](int64_t c, int64_t j) { return taps(c, c * K::kStride - s.pad_left + j); }, share);
  for (int64_t i = 0; i < count; ++i) store<F>(dweight + i * V, load(dweight + i * V) + load(share + i * V));
  for (int n = 0; n < vectors; ++n) {
    Vec<F> total{};
    for (int64_t r = 0; r < out.rows; ++r) {
      const F* p = dz.at((out.row + r) * K::kStride, out.column * K::kStride) + n * dz.vector;
      Vec<F> sum{};
      for (int64_t c = 0; c < out.columns; ++c, p += K::kStride * dz.column) sum += load(p);
      total += sum;
    }
    store<F>(dbias + n * V, load(dbias + n * V) + total);
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
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % parts;
    Chunk k = chunks.chunk(0, task / parts);
    const Filters<F> filters(s, k.channel, k.channels);
    clear_pixels(dweight, vectors * taps_count);
    clear_pixels(dbias, vectors);
    for (int64_t item = items * part / parts; item < items * (part + 1) / parts; ++item) {
      k.batch = item / tiling.count();
      const BackwardTile t(s, tiling.tile(s, item % tiling.count()));
      const Pixels<F> x = x_tile.read_x(s, k, inputs_of(s, t.reaching)), dout = dout_tile.read(d.out, k, t.reaching);
      with_taps(s, kernel, k.batch, [&](const auto& taps) {
        const Pixels<F> dz = spread_dz<F>(s, t, k, kernel, taps, x, dout, filters, dz_tile);
        add_parameter_gradients<F>(s, t.outputs, k, kernel, taps, dz, x, share, dweight, dbias);
        const Pixels<F> dx =
            t.inputs.column < 0 ? in_scratch(dout_tile.pixels, dout_tile.plane, t.inputs) : dout_tile.write(d.x, k, t.inputs);
        const int64_t up = s.kernel_height - 1 - s.pad_top, before = s.kernel_width - 1 - s.pad_left;
        const Rect spread = t.spread(s.stride);
        convolve<F>(
            dz, {spread.row, spread.row + spread.rows, spread.column, spread.column + spread.columns}, unit_stride(kernel), up,
            before, filters.flipped, static_cast<const F*>(nullptr), t.inputs, k.vectors<F>(),
            [&](int64_t c, int64_t j) { return taps(c, c - before + j); },
            [&](int64_t r, int64_t c, int n, Vec<F> sum) { store<F>(dx.at(r, c) + n * dx.vector, sum); });
      });
      store_input_gradient<F>(d, k, t.inputs, dout_tile);
    }
    k.batch = part;
    const DType compute = s.is_double ? DType::kFloat64 : DType::kFloat32;
    const GridView weight_parts = {d.weight, compute, s.channels * taps_count, taps_count, s.kernel_width, 1};
    const GridView bias_parts = {d.bias, compute, s.channels, 1, 0, 0};
    store_rect<F>(dweight, V * taps_count, weight_parts, k, {0, 0, s.kernel_height, s.kernel_width}, filters.offset);
    if (d.bias) store_rect<F>(dbias, V, bias_parts, k, {0, 0, 1, 1}, filters.offset);
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
  if (s.is_double) {
    with_any_kernel(s, [&](const auto& kernel) { forward<double>(s, kernel, begin, end); });
  } else {
    with_kernel(s, [&](const auto& kernel) { forward<float>(s, kernel, begin, end); });
  }
}

void backward_any(const DepthwiseConv2d& s, const DepthwiseConv2dGradients& d, int64_t begin, int64_t end) {
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
