#include "anomaly_map.h"

#include "block.h"
#include "math.h"
#include "scratch.h"

namespace iumad::IUMAD_ISA {
namespace {

// ---- distances and their gradient: over channels, pixels in lanes
// ---------------------------------------------------------------

constexpr int64_t kBlockPixels = 256;  // of a task
constexpr int64_t kChannelRun = 64;    // channels transposed at a time where pixels are not neighbours in memory

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

bool flat(const AnomalyMap& s, const FeatureView& v) { return v.row == s.columns * v.column; }

// An image's pixels, cut into blocks of neighbours: of all its pixels if every view has one stride from row to row, else of a
// row.
struct PixelBlocks {
  int64_t rows, columns, blocks;

  explicit PixelBlocks(const AnomalyMap& s) {
    const bool one = flat(s, s.features) && flat(s, s.reference);
    rows = one ? 1 : s.rows;
    columns = one ? s.rows * s.columns : s.columns;
    blocks = (columns + kBlockPixels - 1) / kBlockPixels;
  }
  int64_t per_image() const { return rows * blocks; }
};

// Pixels [column, column + pixels) of a row of an image.
struct PixelBlock {
  int64_t batch, row, column, pixels, first;  // first: the pixel's number in the image

  PixelBlock(const PixelBlocks& p, int64_t task) {
    const int64_t i = task % p.per_image(), k = i % p.blocks;
    batch = task / p.per_image();
    row = i / p.blocks;
    column = p.columns * k / p.blocks;
    pixels = p.columns * (k + 1) / p.blocks - column;
    first = row * p.columns + column;
  }
  int64_t offset(const FeatureView& v, int64_t pixel) const {
    return batch * v.batch + row * v.row + (column + pixel) * v.column;
  }
};

int64_t feature_tasks(const AnomalyMap& s) { return s.batch * PixelBlocks(s).per_image(); }

// Calls f(pixel, lanes) for vectors of pixels; the last one overlaps the one before rather than being short.
template <class F, class Visitor>
void for_pixel_vectors(int64_t pixels, Visitor&& f) {
  constexpr int V = kLanes<F>;
  if (pixels < V) {
    if (pixels > 0) f(int64_t(0), int(pixels));
    return;
  }
  for (int64_t i = 0; i < pixels; i += V) f(least(i, pixels - V), V);
}

bool neighbours(const FeatureView& v) { return v.data == nullptr || v.column == 1; }

// Channels [0, count) of a vector of pixels, [channel][lane], between memory and scratch.
template <class F>
struct ChannelRun {
  Scratch memory{2 * Scratch::bytes<F>(kChannelRun * kLanes<F>) + Scratch::bytes<int64_t>(kChannelRun)};
  F* features = memory.take<F>(kChannelRun * kLanes<F>);
  F* reference = memory.take<F>(kChannelRun * kLanes<F>);
  int64_t* offset = memory.take<int64_t>(kChannelRun);

  void set_offsets(const FeatureView& v, int64_t count) {
    for (int64_t c = 0; c < count; ++c) offset[c] = c * v.channel;
  }
  void load(F* dst, const FeatureView& v, int64_t element, int64_t count, int lanes) {
    set_offsets(v, count);
    load_block<F>(dst, static_cast<char*>(v.data) + element * size_of(v.dtype), v.dtype, offset, count, v.column, lanes);
  }
  void store(const F* src, const FeatureView& v, int64_t element, int64_t count, int lanes) {
    set_offsets(v, count);
    store_block<F>(src, static_cast<char*>(v.data) + element * size_of(v.dtype), v.dtype, offset, count, v.column, lanes);
  }
};

template <class F>
void store_some(F* dst, Vec<F> v, int lanes) {
  if (lanes == kLanes<F>) return store<F>(dst, v);
  std::memcpy(dst, &v, lanes * sizeof(F));
}

template <class F>
Vec<F> load_some(const F* src, int lanes) {
  if (lanes == kLanes<F>) return load(src);
  Vec<F> v{};
  std::memcpy(&v, src, lanes * sizeof(F));
  return v;
}

template <class F>
void distances(const AnomalyMap& s, int64_t begin, int64_t end) {
  constexpr int V = kLanes<F>;
  const PixelBlocks blocks(s);
  ChannelRun<F> run;
  for (int64_t task = begin; task < end; ++task) {
    const PixelBlock b(blocks, task);
    F* out = static_cast<F*>(s.distance) + b.batch * s.rows * s.columns + b.first;
    if (neighbours(s.features) && neighbours(s.reference) && b.pixels >= V) {  // memory is read in the order in which it lies
      Vec<F> sum[kBlockPixels / V + 1] = {};
      visit<F>(s.features.dtype, s.features.data, [&](const auto* f) {
        visit<F>(s.reference.dtype, s.reference.data, [&](const auto* r) {
          for (int64_t c = 0; c < s.channels; ++c) {
            const auto* p = f + b.offset(s.features, 0) + c * s.features.channel;
            const auto* q = r + b.offset(s.reference, 0) + c * s.reference.channel;
            Vec<F>* total = sum;
            for_pixel_vectors<F>(b.pixels, [&](int64_t i, int) {
              const Vec<F> x = load_lanes(p + i) - load_lanes(q + i);
              *total = fma(x, x, *total);
              ++total;
            });
          }
        });
      });
      const Vec<F>* total = sum;
      for_pixel_vectors<F>(b.pixels, [&](int64_t i, int) { store<F>(out + i, sqrt<F>(*total++)); });
      continue;
    }
    for_pixel_vectors<F>(b.pixels, [&](int64_t i, int lanes) {
      Vec<F> sum{};
      for (int64_t c = 0; c < s.channels; c += kChannelRun) {
        const int64_t count = least(kChannelRun, s.channels - c);
        run.load(run.features, s.features, b.offset(s.features, i) + c * s.features.channel, count, lanes);
        run.load(run.reference, s.reference, b.offset(s.reference, i) + c * s.reference.channel, count, lanes);
        for (int64_t k = 0; k < count; ++k) {
          const Vec<F> x = load(run.features + k * V) - load(run.reference + k * V);
          sum = fma(x, x, sum);
        }
      }
      store_some<F>(out + i, sqrt<F>(sum), lanes);
    });
  }
}

template <class F>
void feature_gradients(const AnomalyMap& s, const AnomalyMapGradients& d, int64_t begin, int64_t end) {
  constexpr int V = kLanes<F>;
  const PixelBlocks blocks(s);
  ChannelRun<F> run;
  for (int64_t task = begin; task < end; ++task) {
    const PixelBlock b(blocks, task);
    const int64_t first = b.batch * s.rows * s.columns + b.first;
    F scale[kBlockPixels];  // dd / d, and 0 where d = 0 (the norm's subgradient)
    for (int64_t i = 0; i < b.pixels; ++i) {
      const F distance = static_cast<const F*>(s.distance)[first + i];
      scale[i] = distance == F(0) ? F(0) : static_cast<const F*>(d.distance)[first + i] / distance;
    }
    if (neighbours(s.features) && neighbours(s.reference) && neighbours(d.features) && neighbours(d.reference) && b.pixels >= V) {
      visit<F>(s.features.dtype, s.features.data, [&](const auto* f) {
        visit<F>(s.reference.dtype, s.reference.data, [&](const auto* r) {
          auto* df = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(f)>>*>(d.features.data);
          auto* dr = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(r)>>*>(d.reference.data);
          for (int64_t c = 0; c < s.channels; ++c) {
            for_pixel_vectors<F>(b.pixels, [&](int64_t i, int) {
              const Vec<F> x = load_lanes(f + b.offset(s.features, i) + c * s.features.channel) -
                               load_lanes(r + b.offset(s.reference, i) + c * s.reference.channel);
              const Vec<F> g = load(scale + i) * x;
              if (df) store_lanes(df + b.offset(d.features, i) + c * d.features.channel, g);
              if (dr) store_lanes(dr + b.offset(d.reference, i) + c * d.reference.channel, -g);
            });
          }
        });
      });
      continue;
    }
    for_pixel_vectors<F>(b.pixels, [&](int64_t i, int lanes) {
      const Vec<F> factor = load_some<F>(scale + i, lanes);
      for (int64_t c = 0; c < s.channels; c += kChannelRun) {
        const int64_t count = least(kChannelRun, s.channels - c);
        run.load(run.features, s.features, b.offset(s.features, i) + c * s.features.channel, count, lanes);
        run.load(run.reference, s.reference, b.offset(s.reference, i) + c * s.reference.channel, count, lanes);
        for (int64_t k = 0; k < count; ++k) {
          const Vec<F> g = factor * (load(run.features + k * V) - load(run.reference + k * V));
          store<F>(run.features + k * V, g);
          store<F>(run.reference + k * V, -g);
        }
        const int64_t to = b.offset(d.features, i) + c * d.features.channel;
        if (d.features.data) run.store(run.features, d.features, to, count, lanes);
        const int64_t to_reference = b.offset(d.reference, i) + c * d.reference.channel;
        if (d.reference.data) run.store(run.reference, d.reference, to_reference, count, lanes);
      }
    });
  }
}

// ---- map and score: an image per task, columns of the map in lanes
// --------------------------------------------------------------

// Rows of the map in scratch: long enough for whole vectors and for the reach of a window beyond the last column.
template <class F>
int64_t row_pitch(const AnomalyMap& s) {
  constexpr int64_t V = kLanes<F>;
  return (s.width + s.pool + 2 * V) / V * V;
}

// dst[x] = sum over the taps of row x.
template <class F>
void resample(F* dst, const F* src, const SparseRows& m, int64_t rows) {
  for (int64_t x = 0; x < rows; ++x) {
    F sum = F(0);
    for (int64_t k = m.first[x]; k < m.first[x + 1]; ++k) sum += F(m.weight[k]) * src[m.index[k]];
    dst[x] = sum;
  }
}

// window[x] = column[x] + ... + column[x + n - 1], by doubling; column is overwritten.
template <class F>
void sum_windows(F* window, F* column, int64_t n, int64_t width) {
  constexpr int V = kLanes<F>;
  int64_t from = 0;
  for (int64_t size = 1; size <= n; size *= 2) {  // column[x] = sum of `size` values from x on
    if (n & size) {
      for (int64_t x = 0; x < width; x += V) {
        const Vec<F> more = load(column + x + from);
        store<F>(window + x, from == 0 ? more : load(window + x) + more);
      }
      from += size;
    }
    if (2 * size <= n)
      for (int64_t x = 0; x < width + n - 2 * size; x += V) store<F>(column + x, load(column + x) + load(column + x + size));
  }
}

template <class F>
struct Best {
  F value{};
  int64_t place = -1;

  // Takes the first largest of the values (a NaN counts as largest) if it beats what there is.
  void offer(const F* values, int64_t count, int64_t first_place) {
    constexpr int V = kLanes<F>;
    F most = values[0];
    int64_t x = 0;
    if (count >= V) {
      Vec<F> top = load(values);
      for (x = V; x + V <= count; x += V) {
        const Vec<F> v = load(values + x);
        top = ((v <= top) | (top != top)) ? top : v;
      }
      for (int lane = 0; lane < V; ++lane) most = larger(most, top[lane]);
    }
    for (; x < count; ++x) most = larger(most, values[x]);
    if (place >= 0 && same(larger(value, most), value)) return;
    value = most;
    for (x = 0; !same(values[x], most); ++x) {
    }
    place = first_place + x;
  }
  static F larger(F a, F b) { return b <= a || a != a ? a : b; }
  static bool same(F a, F b) { return a == b || (a != a && b != b); }
};

template <class F>
void maps(const AnomalyMap& s, int64_t begin, int64_t end) {
  constexpr int V = kLanes<F>;
  const int64_t pitch = row_pitch<F>(s), windows = s.width - s.pool + 1;
  Scratch memory(Scratch::bytes<F>(s.rows * pitch) + 2 * Scratch::bytes<F>(s.pool * pitch) + 3 * Scratch::bytes<F>(pitch));
  F* source = memory.take<F>(s.rows * pitch);  // rows of d, resampled to the width of the map
  F* block = memory.take<F>(s.pool * pitch);   // rows of the map in this block
  F* tails = memory.take<F>(s.pool * pitch);   // of the block before: row j holds the sum of its rows j, j + 1, ...
  F* head = memory.take<F>(pitch);             // sum of this block's rows so far
  F *column = memory.take<F>(pitch), *window = memory.take<F>(pitch);
  std::memset(source, 0, s.rows * pitch * sizeof(F));
  std::memset(column, 0, pitch * sizeof(F));
  for (int64_t b = begin; b < end; ++b) {
    const F* distance = static_cast<const F*>(s.distance) + b * s.rows * s.columns;
    F* map = static_cast<F*>(s.map) + b * s.height * s.width;
    for (int64_t i = 0; i < s.rows; ++i) resample<F>(source + i * pitch, distance + i * s.columns, s.X, s.width);
    Best<F> best;
    for (int64_t y = 0; y < s.height; ++y) {
      const int64_t j = y % s.pool;
      F* row = block + j * pitch;
      for (int64_t x = 0; x < s.width; x += V) {
        Vec<F> v{};
        for (int64_t k = s.Y.first[y]; k < s.Y.first[y + 1]; ++k)
          v = fma(broadcast(F(s.Y.weight[k])), load(source + s.Y.index[k] * pitch + x), v);
        const Vec<F> sum = j == 0 ? v : load(head + x) + v;
        store<F>(row + x, v);
        store<F>(head + x, sum);
        store<F>(column + x, y >= s.pool && j + 1 < s.pool ? load(tails + (j + 1) * pitch + x) + sum : sum);
      }
      std::memcpy(map + y * s.width, row, s.width * sizeof(F));
      if (y + 1 >= s.pool) {
        sum_windows<F>(window, column, s.pool, s.width);
        best.offer(window, windows, (y - s.pool + 1) * s.width);
      }
      if (j + 1 < s.pool) continue;
      for (int64_t i = s.pool - 2; i >= 0; --i)
        for (int64_t x = 0; x < s.width; x += V)
          store<F>(block + i * pitch + x, load(block + i * pitch + x) + load(block + (i + 1) * pitch + x));
      F* used = tails;
      tails = block;
      block = used;
    }
    static_cast<F*>(s.score)[b] = best.value / F(s.pool * s.pool);
    s.peak[b] = best.place;
  }
}

template <class F>
void distance_gradients(const AnomalyMap& s, const AnomalyMapGradients& d, int64_t begin, int64_t end) {
  constexpr int V = kLanes<F>;
  const int64_t pitch = row_pitch<F>(s);
  Scratch memory(Scratch::bytes<F>(s.rows * pitch) + Scratch::bytes<F>(pitch));
  F *source = memory.take<F>(s.rows * pitch), *row = memory.take<F>(pitch);
  for (int64_t b = begin; b < end; ++b) {
    std::memset(source, 0, s.rows * pitch * sizeof(F));
    std::memset(row, 0, pitch * sizeof(F));
    const F* map = d.map ? static_cast<const F*>(d.map) + b * s.height * s.width : nullptr;
    const F share = d.score ? static_cast<const F*>(d.score)[b] / F(s.pool * s.pool) : F(0);
    const int64_t top = s.peak[b] / s.width, left = s.peak[b] % s.width;
    for (int64_t y = 0; y < s.height; ++y) {
      const bool inside = d.score && y >= top && y < top + s.pool;
      if (!map && !inside) continue;
      if (map) {
        std::memcpy(row, map + y * s.width, s.width * sizeof(F));
      } else {
        std::memset(row, 0, s.width * sizeof(F));
      }
      if (inside)
        for (int64_t x = left; x < left + s.pool; ++x) row[x] += share;
      for (int64_t k = s.Y.first[y]; k < s.Y.first[y + 1]; ++k) {
        F* dst = source + s.Y.index[k] * pitch;
        const Vec<F> w = broadcast(F(s.Y.weight[k]));
        for (int64_t x = 0; x < s.width; x += V) store<F>(dst + x, fma(w, load(row + x), load(dst + x)));
      }
    }
    F* out = static_cast<F*>(d.distance) + b * s.rows * s.columns;
    for (int64_t i = 0; i < s.rows; ++i) resample<F>(out + i * s.columns, source + i * pitch, s.X_transposed, s.columns);
  }
}

void distances_any(const AnomalyMap& s, int64_t begin, int64_t end) {
  s.is_double ? distances<double>(s, begin, end) : distances<float>(s, begin, end);
}
void maps_any(const AnomalyMap& s, int64_t begin, int64_t end) {
  s.is_double ? maps<double>(s, begin, end) : maps<float>(s, begin, end);
}
void distance_gradients_any(const AnomalyMap& s, const AnomalyMapGradients& d, int64_t begin, int64_t end) {
  s.is_double ? distance_gradients<double>(s, d, begin, end) : distance_gradients<float>(s, d, begin, end);
}
void feature_gradients_any(const AnomalyMap& s, const AnomalyMapGradients& d, int64_t begin, int64_t end) {
  s.is_double ? feature_gradients<double>(s, d, begin, end) : feature_gradients<float>(s, d, begin, end);
}

}  // namespace

extern const AnomalyMapKernels anomaly_map;
const AnomalyMapKernels anomaly_map = {feature_tasks, distances_any, maps_any, distance_gradients_any, feature_gradients_any};

}  // namespace iumad::IUMAD_ISA
