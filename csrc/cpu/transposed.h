// Kernels for NCHW features of groups with many channels: tiles of rows are transposed and filtered
// by the kernels for channels_last features. Of 128 channels, a pixel is transposed in less time
// than two of its taps take, and vectors along channels have no ends of rows, no phases of a stride
// and no subpixels between them.
#pragma once
#include "cpu/channels_last.h"
#include "cpu/nchw.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// Rows [begin, end).
struct Rows {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The rows of the features that output rows read.
inline Rows rows_read_by(const Geometry& g, Rows out) {
  const int64_t extent = (g.kernel - 1) * g.dilation, pad = g.padding();
  const int64_t begin = std::min(std::max<int64_t>(out.begin * g.stride - pad, 0), g.height);
  return {begin, std::clamp((out.end - 1) * g.stride - pad + extent + 1, begin, g.height)};
}

// The rows of output pixels that read rows of the features.
inline Rows rows_that_read(const Geometry& g, Rows features) {
  const int64_t extent = (g.kernel - 1) * g.dilation, pad = g.padding();
  const int64_t first = features.begin + pad - extent;
  const int64_t begin = std::min(first > 0 ? ceil_div(first, g.stride) : 0, g.out_height);
  return {begin, std::clamp((features.end - 1 + pad) / g.stride + 1, begin, g.out_height)};
}

// The channels of a tile, which are computed together, and the partition into tiles.
struct Tiles {
  // The sum over the lanes of the gradient of a spatial filter's tap is shared by this many.
  static constexpr int64_t kChannels = 128;
  static constexpr int64_t kBytes = 512 * 1024;

  int64_t channels;
  Geometry geometry;  // of the plan
  Plan plan;

  // rows x columns pixels. A row of a tile reads and writes so many pixels of features and outputs,
  // in elements of so many bytes.
  Tiles(const Geometry& g, int64_t rows, int64_t columns, int64_t pixels, int64_t bytes)
      : channels(std::min(g.group_channels, kChannels)),
        geometry(with_output(g, rows, columns)),
        plan(geometry, (channels * pixels + g.subpixels() * g.taps() * g.out_width) * bytes, 0,
             kBytes) {}

  // The most rows that rows_for(rows of a tile) has.
  template <class F>
  int64_t most(const F& rows_for) const {
    int64_t rows = 0;
    for (int64_t row = 0; row < geometry.out_height; row += plan.rows)
      rows = std::max(rows,
                      rows_for(Rows{row, std::min(row + plan.rows, geometry.out_height)}).size());
    return rows;
  }

  // The geometry of a tile's pixels: one image of one group, of `channels` channels.
  static Geometry of_image(Geometry g, int64_t channels) {
    g.batch = g.groups = 1;
    g.channels = g.group_channels = channels;
    return g;
  }

 private:
  static Geometry with_output(Geometry g, int64_t rows, int64_t columns) {
    g.out_height = rows;
    g.out_width = columns;
    return g;
  }
};

// Filters the tiles of one thread, from and to channels_last buffers.
template <class T>
class TileFilter {
  using A = Accumulate<T>;

 public:
  // Of one image of one group, without filters; pixels are `channels` apart.
  static Filtering<A> of_image(const Filtering<T>& f, int64_t channels) {
    const int64_t taps = f.g.taps(), pixel = f.g.subpixels() * taps;
    // The spatial filter is copied to [rows][Wo][subpixels][taps].
    const SpatialStrides strides{0, taps, 1, f.g.out_width * pixel, pixel};
    return {Tiles::of_image(f.g, channels), f.own_filter, strides, f.pack};
  }

  // `strips` is of the result of of_image, `tile`. Reads at most filter_rows rows of the spatial
  // filter at a time.
  TileFilter(const Filtering<T>& f, const Filtering<A>& tile, const RowStrips<A>& strips,
             int64_t filter_rows)
      : f_(f),
        strips_(strips),
        tile_(tile),
        spatial_(f.spatial_filter ? filter_rows * tile.strides.row : 0, false),
        planes_(f.g.subpixels() * f.g.taps() * round_up(filter_rows * f.g.out_width, L)),
        channel_(tile.g.channels * f.g.subpixels() * f.g.taps(), false) {}

  // Without a spatial filter, its planes are neutral.
  void read_spatial_filter(int64_t image, int64_t group, Rows rows, A neutral) {
    const Geometry& g = f_.g;
    const int64_t size = rows.size() * g.out_width, taps = g.taps();
    first_row_ = rows.begin;
    plane_ = round_up(size, L);
    for (int64_t r = 0; r < g.subpixels(); ++r) {
      A* const planes = planes_ + r * taps * plane_;
      fill_spatial(planes, plane_, g.out_width, g, f_.spatial_filter, f_.strides,
                   image * g.subpixels() + r, group, rows.begin, rows.end, neutral);
      if (f_.spatial_filter == nullptr) continue;
      for (int64_t j = 0; f_.pack.normalize_spatial && j < size; j += L)
        standardize<A, L>(planes + j, taps, plane_, f_.pack.eps, f_.pack.spatial_scale);
      transpose(spatial_ + r * taps, tile_.strides.column, planes, plane_, taps, size);
      tile_.spatial_filter = spatial_ - rows.begin * tile_.strides.row;
    }
  }
  // What was read for a row of a subpixel, [taps][plane].
  const A* spatial_row(int64_t r, int64_t row) {
    return planes_ + r * f_.g.taps() * plane_ + (row - first_row_) * f_.g.out_width;
  }
  int64_t plane() const { return plane_; }

  // Rows of `count` channels from c on. The buffers start at rows `from_row` and to_rows.begin.
  template <class Combine>
  void filter(int64_t image, int64_t c, int64_t count, const A* from, int64_t from_row, A* to,
              Rows to_rows) {
    const Geometry& g = f_.g;
    const int64_t in_row = g.width, out_row = g.subpixels() * g.out_width, taps = g.taps();
    tile_.g.group_channels = count;
    tile_.pack = f_.pack.from_channel(c, taps);
    tile_.pack.normalize_spatial = false;
    if (f_.channel_filter) tile_.channel_filter = channel_;
    for (int64_t r = 0; f_.channel_filter && r < g.subpixels(); ++r)
      load_row(channel_ + r * tile_.g.channels * taps,
               f_.channel_filter + ((image * g.subpixels() + r) * g.channels + c) * taps,
               count * taps, 1);
    tile_.from = from - from_row * (f_.own_filter ? in_row : out_row) * tile_.g.channels;
    tile_.to = to - to_rows.begin * (f_.own_filter ? out_row : in_row) * tile_.g.channels;
    if (is_3x3(g, f_.own_filter))
      filter_rows_3x3<A, Combine>(tile_, to_rows.begin, to_rows.end);
    else
      filter_rows_of_strips<A, Combine>(tile_, strips_, to_rows.begin, to_rows.end);
  }

 private:
  static constexpr int L = kLanes<A>;
  const Filtering<T>& f_;
  const RowStrips<A>& strips_;
  Filtering<A> tile_;
  int64_t first_row_ = 0, plane_ = 0;
  Scratch<A> spatial_, planes_, channel_;
};

// Planes of rows of `size` elements in NCHW tensors.
template <class T>
struct Planes {
  T* data;
  int64_t rows, size;

  T* row(int64_t plane, int64_t row) const { return data + (plane * rows + row) * size; }
  // Between `count` planes and a buffer whose pixels are `channels` apart.
  template <class A>
  void load(A* to, int64_t channels, int64_t plane, int64_t count, Rows of) const {
    transpose(to, channels, row(plane, of.begin), rows * size, count, of.size() * size);
  }
  template <class A>
  void store(const A* from, int64_t channels, int64_t plane, int64_t count, Rows of) const {
    constexpr int64_t kSize = sizeof(T), kLine = 64 / kSize;
    const int64_t pitch = rows * size, pixels = of.size() * size;
    if (pitch % kLine == 0 && pitch * kSize > 512)
      return transpose(row(plane, of.begin), pitch, from, channels, pixels, count);
    // Vectors of planes that do not start with a cache line, or of short ones, are stored plane by
    // plane, from a buffer in the L1 cache: stored in turns, they take up to twice as long where
    // the planes are in no cache.
    constexpr int64_t kPlanes = 16, kPixels = 128, kPitch = kPixels + kLanes<A>;
    alignas(64) A buffer[kPlanes * kPitch];
    for (int64_t c = 0; c < count; c += kPlanes)
      for (int64_t i = 0; i < pixels; i += kPixels) {
        const int64_t block = std::min(kPlanes, count - c), length = std::min(kPixels, pixels - i);
        T* const to = row(plane + c, of.begin) + i;
        for (int64_t n = 0; n < block; ++n)
          for (int64_t j = 0; j < length; j += kLine) __builtin_prefetch(to + n * pitch + j, 1);
        transpose(buffer, kPitch, from + i * channels + c, channels, length, block);
        store_rows(to, pitch, buffer, kPitch, block, length);
      }
  }
};

// Forward and grad_features.
template <class T, class Combine>
void filter_transposed(const Filtering<T>& f, ParallelFor run) {
  using A = Accumulate<T>;
  const Geometry& g = f.g;
  const int64_t in_row = g.width, out_row = g.subpixels() * g.out_width;
  const Planes<const T> from{f.from, f.own_filter ? g.height : g.out_height,
                             f.own_filter ? in_row : out_row};
  const Planes<T> to{f.to, f.rows(), f.own_filter ? out_row : in_row};
  const int64_t pixels =
      to.size + (f.own_filter ? g.stride * from.size : ceil_div(from.size, g.stride));
  const Tiles tiles(g, f.rows(), f.columns(), pixels, sizeof(A));
  const Plan& plan = tiles.plan;
  const int64_t channels = tiles.channels;
  const auto rows_from = [&](Rows rows) {
    return f.own_filter ? rows_read_by(g, rows) : rows_that_read(g, rows);
  };
  const int64_t from_rows = tiles.most(rows_from);
  const Filtering<A> of_image = TileFilter<T>::of_image(f, channels);
  const RowStrips<A> strips(of_image, false);
  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    Scratch<A> x(channels * from_rows * from.size, false);
    Scratch<A> y(channels * plan.rows * to.size, false);
    TileFilter<T> tile(f, of_image, strips, f.own_filter ? plan.rows : from_rows);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(tiles.geometry, index);
      const Rows rows{item.row0, item.row1}, read = rows_from(rows);
      tile.read_spatial_filter(item.image, item.group, f.own_filter ? rows : read,
                               A(Combine::kNeutral));
      for (int64_t c = item.channel0; c < item.channel1; c += channels) {
        const int64_t count = std::min(channels, item.channel1 - c);
        const int64_t plane = item.image * g.channels + c;
        from.load(x.get(), channels, plane, count, read);
        tile.template filter<Combine>(item.image, c, count, x, read.begin, y, rows);
        to.store(y.get(), channels, plane, count, rows);
      }
    }
  });
}

// The gradients of the filters, and of the features if they are needed.
template <class T, class Combine>
void backward_transposed(const Backward& b, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = b.geometry;
  const int64_t taps = g.taps(), subpixels = g.subpixels();
  const int64_t in_row = g.width, out_row = subpixels * g.out_width;
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const Planes<const T> features{static_cast<const T*>(b.features), g.height, in_row};
  const Planes<const T> grad{static_cast<const T*>(b.grad), g.out_height, out_row};
  const Planes<T> grad_features{static_cast<T*>(b.grad_features), g.height, in_row};
  const int64_t pixels = (b.grad_features ? 2 : 1) * g.stride * in_row + out_row;
  const Tiles tiles(g, g.out_height, g.out_width, pixels, sizeof(A));
  const Plan& plan = tiles.plan;
  const int64_t channels = tiles.channels;
  const ChannelPartials<T> channel_partials(b, by_subpixel(g), plan);
  SpatialPartials<T> spatial_partials(b, by_subpixel(g), plan);
  const std::vector<int64_t> inside = inside_pixels(g);
  // The rows of the features, of the gradient that a tile computes, and of what it reads.
  const auto rows_in = [&](Rows out) { return rows_read_by(g, out); };
  const auto rows_of = [&](Rows out) {
    if (b.grad_features == nullptr) return Rows{0, 0};
    return Rows{out.begin * g.stride, out.end == g.out_height ? g.height : out.end * g.stride};
  };
  const auto rows_of_grad = [&](Rows out) {
    if (b.grad_features == nullptr) return out;
    const Rows rows = rows_that_read(g, rows_of(out));
    return Rows{std::min(out.begin, rows.begin), std::max(out.end, rows.end)};
  };
  const int64_t most_in = tiles.most(rows_in), most_of = tiles.most(rows_of);
  const int64_t most_grad = tiles.most(rows_of_grad);
  const Filtering<T> f(b);
  const Filtering<A> of_image = TileFilter<T>::of_image(f, channels);
  const RowStrips<A> strips(of_image, false);

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const int64_t filter_row = taps * g.out_width, filter_rows = plan.rows * subpixels;
    const int64_t blocks = round_up(channels, L) * taps;
    Scratch<A> x(channels * most_in * in_row, false), dy(channels * most_grad * out_row, false);
    Scratch<A> dx(channels * most_of * in_row, false);
    // [rows][subpixels][taps][Wo]
    Scratch<A> grad_spatial(filter_rows * filter_row, false);
    Scratch<A> channel(blocks), grad_channel(blocks), later_sums(filter_row, false);
    TileFilter<T> tile(f, of_image, strips, most_grad);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(tiles.geometry, index);
      const Rows out{item.row0, item.row1};
      const Rows in = rows_in(out), of = rows_of(out), of_grad = rows_of_grad(out);
      tile.read_spatial_filter(item.image, item.group, of_grad, A(Combine::kNeutral));
      for (int64_t c = item.channel0; c < item.channel1; c += channels) {
        const int64_t count = std::min(channels, item.channel1 - c);
        const int64_t first = item.image * g.channels + c;
        features.load(x.get(), channels, first, count, in);
        grad.load(dy.get(), channels, first, count, of_grad);
        if (b.grad_features) {
          tile.template filter<Combine>(item.image, c, count, dy, of_grad.begin, dx, of);
          grad_features.store(dx.get(), channels, first, count, of);
        }
        for (int64_t r = 0; r < subpixels; ++r) {
          const int64_t image = item.image * subpixels + r;
          fill_channel_blocks(channel.get(), taps, g, channel_filter, image, c, c + count, false,
                              A(Combine::kNeutral));
          std::fill(grad_channel.get(), grad_channel + blocks, A(0));
          for (int64_t row = out.begin; row < out.end; ++row) {
            const int64_t at = row - out.begin;
            const int64_t pixel =
                (row - of_grad.begin) * out_row + r / g.scale * g.scale * g.out_width + r % g.scale;
            // The first channels have nothing to be added to.
            A* const total = grad_spatial + (at * subpixels + r) * filter_row;
            A* const sums = c == item.channel0 ? total : later_sums.get();
            std::fill(sums, sums + filter_row, A(0));
            grad_filters_of_row<A, Combine>(
                {of_image.g, inside.data(), x - in.begin * in_row * channels, dy + pixel * channels,
                 g.scale * channels, tile.spatial_row(r, row), tile.plane(), sums, channel,
                 grad_channel, count},
                row, false);
            for (int64_t i = 0; sums != total && i < filter_row; ++i) total[i] += sums[i];
          }
          channel_partials.add_blocks(image, item.tile, c, count, grad_channel);
        }
      }
      for (int64_t row = out.begin; row < out.end; ++row)
        for (int64_t r = 0; r < subpixels; ++r)
          spatial_partials.add(item.channel_block, item.image * subpixels + r, item.group, row,
                               grad_spatial + ((row - out.begin) * subpixels + r) * filter_row,
                               g.out_width);
    }
  });
  channel_partials.write(run);
  spatial_partials.write(run);
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
