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

  // rows x columns pixels. A row of a tile reads and writes so many pixels of features and outputs.
  template <class A>
  Tiles(const Geometry& g, int64_t rows, int64_t columns, int64_t pixels, A)
      : channels(std::min(g.group_channels, kChannels)),
        geometry(with_output(g, rows, columns)),
        plan(geometry,
             (channels * pixels + g.subpixels() * g.taps() * g.out_width) *
                 static_cast<int64_t>(sizeof(A)),
             0, kBytes) {}

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

// Forward and grad_features.
template <class T, class Combine>
void filter_transposed(const Filtering<T>& f, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = f.g;
  const int64_t taps = g.taps(), subpixels = g.subpixels();
  // Elements of a row of pixels, with its subpixels.
  const int64_t in_row = g.width, out_row = subpixels * g.out_width;
  const int64_t from_row = f.own_filter ? in_row : out_row;
  const int64_t to_row = f.own_filter ? out_row : in_row;
  const int64_t from_rows = f.own_filter ? g.height : g.out_height;
  const int64_t row_pixels = f.own_filter ? g.stride * from_row : ceil_div(from_row, g.stride);
  const Tiles tiles(g, f.rows(), f.columns(), row_pixels + to_row, A());
  const Plan& plan = tiles.plan;
  const int64_t channels = tiles.channels;
  const auto rows_from = [&](Rows to) {
    return f.own_filter ? rows_read_by(g, to) : rows_that_read(g, to);
  };
  int64_t most_rows = 0;
  for (int64_t row = 0; row < f.rows(); row += plan.rows)
    most_rows = std::max(most_rows, rows_from({row, std::min(row + plan.rows, f.rows())}).size());
  // The spatial filter of a tile, [rows][Wo][subpixels][taps].
  const SpatialStrides strides{0, taps, 1, out_row * taps, subpixels * taps};
  const int64_t filter_rows = f.own_filter ? plan.rows : most_rows;

  const Filtering<A> of_image(Tiles::of_image(g, channels), f.own_filter, strides, f.pack);
  const bool has_3x3_windows = is_3x3(of_image.g, f.own_filter);
  const RowStrips<A> strips(of_image, false);
  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    Scratch<A> x(channels * most_rows * from_row, false), y(channels * plan.rows * to_row, false);
    Scratch<A> spatial(f.spatial_filter ? filter_rows * strides.row : 0, false);
    Scratch<A> channel(channels * subpixels * taps, false);
    Scratch<A> planes(f.spatial_filter ? taps * round_up(filter_rows * g.out_width, L) : 0);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(tiles.geometry, index);
      const Rows to{item.row0, item.row1}, from = rows_from(to);
      const Rows filters = f.own_filter ? to : from;
      Filtering<A> tile = of_image;
      if (f.spatial_filter) tile.spatial_filter = spatial - filters.begin * strides.row;
      for (int64_t r = 0; f.spatial_filter && r < subpixels; ++r) {
        const int64_t size = filters.size() * g.out_width, plane = round_up(size, L);
        fill_spatial(planes.get(), plane, g.out_width, g, f.spatial_filter, f.strides,
                     item.image * subpixels + r, item.group, filters.begin, filters.end, A(0));
        for (int64_t j = 0; f.pack.normalize_spatial && j < size; j += L)
          standardize<A, L>(planes + j, taps, plane, f.pack.eps, f.pack.spatial_scale);
        transpose(spatial + r * strides.subpixel, strides.column, planes.get(), plane, taps, size);
      }
      for (int64_t c = item.channel0; c < item.channel1; c += channels) {
        const int64_t count = std::min(channels, item.channel1 - c);
        const int64_t plane = item.image * g.channels + c;
        tile.g.group_channels = count;
        tile.pack = f.pack.from_channel(c, taps);
        tile.pack.normalize_spatial = false;
        if (f.channel_filter) tile.channel_filter = channel;
        for (int64_t r = 0; f.channel_filter && r < subpixels; ++r)
          load_row(channel + r * channels * taps,
                   f.channel_filter + ((item.image * subpixels + r) * g.channels + c) * taps,
                   count * taps, 1);
        transpose(x.get(), channels, f.from + plane * from_rows * from_row + from.begin * from_row,
                  from_rows * from_row, count, from.size() * from_row);
        tile.from = x - from.begin * from_row * channels;
        tile.to = y - to.begin * to_row * channels;
        if (has_3x3_windows)
          filter_rows_3x3<A, Combine>(tile, to.begin, to.end);
        else
          filter_rows_of_strips<A, Combine>(tile, strips, to.begin, to.end);
        transpose(f.to + plane * f.rows() * to_row + to.begin * to_row, f.rows() * to_row, y.get(),
                  channels, to.size() * to_row, count);
      }
    }
  });
}

template <class T, class Combine>
void grad_filters_transposed(const Backward& b, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = b.geometry;
  const int64_t taps = g.taps(), subpixels = g.subpixels();
  const int64_t in_row = g.width, out_row = subpixels * g.out_width;
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* features = static_cast<const T*>(b.features);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  const Tiles tiles(g, g.out_height, g.out_width, g.stride * in_row + out_row, A());
  const Plan& plan = tiles.plan;
  const int64_t channels = tiles.channels;
  const ChannelPartials<T> channel_partials(b, by_subpixel(g), plan);
  SpatialPartials<T> spatial_partials(b, by_subpixel(g), plan);
  const Geometry of_image = Tiles::of_image(g, channels);
  const std::vector<int64_t> inside = inside_pixels(g);
  int64_t most_rows = 0;
  for (int64_t row = 0; row < g.out_height; row += plan.rows)
    most_rows =
        std::max(most_rows, rows_read_by(g, {row, std::min(row + plan.rows, g.out_height)}).size());

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    // The spatial filter of a tile, [subpixels][taps][rows][Wo], and its gradient,
    // [rows][subpixels][taps][Wo].
    const int64_t filter_row = taps * g.out_width, filter_rows = plan.rows * subpixels;
    const int64_t blocks = round_up(channels, L) * taps;
    Scratch<A> x(channels * most_rows * in_row, false), dy(channels * plan.rows * out_row, false);
    Scratch<A> spatial(filter_rows * filter_row, false), grad_spatial(filter_rows * filter_row);
    Scratch<A> channel(blocks), grad_channel(blocks), sums(filter_row);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(tiles.geometry, index);
      const Rows out{item.row0, item.row1}, in = rows_read_by(g, out);
      std::fill(grad_spatial.get(), grad_spatial + filter_rows * filter_row, A(0));
      const int64_t plane = out.size() * g.out_width;
      for (int64_t r = 0; r < subpixels; ++r)
        fill_spatial(spatial + r * taps * plane, plane, g.out_width, g, spatial_filter,
                     b.spatial_strides, item.image * subpixels + r, item.group, out.begin, out.end,
                     A(Combine::kNeutral));
      for (int64_t c = item.channel0; c < item.channel1; c += channels) {
        const int64_t count = std::min(channels, item.channel1 - c);
        const int64_t first = item.image * g.channels + c;
        transpose(x.get(), channels, features + (first * g.height + in.begin) * in_row,
                  g.height * in_row, count, in.size() * in_row);
        transpose(dy.get(), channels, grad + (first * g.out_height + out.begin) * out_row,
                  g.out_height * out_row, count, out.size() * out_row);
        for (int64_t r = 0; r < subpixels; ++r) {
          const int64_t image = item.image * subpixels + r;
          fill_channel_blocks(channel.get(), taps, g, channel_filter, image, c, c + count, false,
                              A(Combine::kNeutral));
          std::fill(grad_channel.get(), grad_channel + blocks, A(0));
          for (int64_t row = out.begin; row < out.end; ++row) {
            const int64_t at = row - out.begin;
            const int64_t pixel = at * out_row + r / g.scale * g.scale * g.out_width + r % g.scale;
            std::fill(sums.get(), sums + filter_row, A(0));
            grad_filters_of_row<A, Combine>(
                {of_image, inside.data(), x - in.begin * in_row * channels, dy + pixel * channels,
                 g.scale * channels, spatial + r * taps * plane + at * g.out_width, plane, sums,
                 channel, grad_channel, count},
                row, false);
            A* const total = grad_spatial + (at * subpixels + r) * filter_row;
            for (int64_t i = 0; i < filter_row; ++i) total[i] += sums[i];
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
