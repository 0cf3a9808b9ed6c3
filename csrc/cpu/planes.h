// Kernels for contiguous (NCHW) features: vectors run along a row.
//
// Rows of features are copied into a zero-padded window, split by the stride's phases, in which
// every tap of the filter reads consecutive values, whatever kernel, stride and dilation are. The
// spatial filter of a tile of rows is kept widened and serves all channels of its group.
#pragma once
#include "cpu/vectors.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// The zero-padded copy of the rows that a tile of output rows reads.
//
// Padded row r and column c lie in phase (r % stride, c % stride) at (r / stride, c / stride); tap
// (ty, tx) of output (i, j) is padded row i * stride + ty * dilation, so it lies offset[t] behind
// i * pitch + j.
template <class A>
struct Window {
  // The values of one phase in a row of the features.
  struct Run {
    int64_t offset;  // in the window, from the row's
    int64_t column;  // the first; the next ones are stride apart
    int64_t count;
  };

  const Geometry& g;
  int64_t rows, columns;  // padded
  int64_t phase_rows, pitch, size;
  std::vector<int64_t> offset;      // of each tap
  std::vector<int64_t> row_offset;  // of each padded row
  std::vector<Run> runs;

  Window(const Geometry& geometry, int64_t out_rows) : g(geometry) {
    const int64_t reach = (g.kernel - 1) * g.dilation, pad = g.padding();
    rows = (out_rows - 1) * g.stride + reach + 1;
    columns = (g.out_width - 1) * g.stride + reach + 1;
    phase_rows = ceil_div(rows, g.stride);
    // A vector that starts in the row may end behind it.
    pitch =
        std::max(ceil_div(columns, g.stride), round_up(g.out_width, kLanes<A>) + reach / g.stride);
    size = g.stride * g.stride * phase_rows * pitch;
    for (int64_t r = 0; r < rows; ++r)
      row_offset.push_back(r % g.stride * g.stride * phase_rows * pitch + r / g.stride * pitch);
    for (int64_t t = 0; t < g.taps(); ++t)
      offset.push_back(row_offset[t / g.kernel * g.dilation] +
                       column_offset(t % g.kernel * g.dilation));
    const int64_t end = std::min(columns, g.width + pad);
    for (int64_t c = pad; c < std::min(pad + g.stride, end); ++c)
      runs.push_back({column_offset(c), c - pad, ceil_div(end - c, g.stride)});
  }

  int64_t column_offset(int64_t column) const {
    return column % g.stride * phase_rows * pitch + column / g.stride;
  }

  // Calls body(index in the window, row of the features, run) for all values that lie in the
  // features and in the window of the output rows from row0 on.
  template <class F>
  DDF_INLINE void for_each_run(int64_t row0, const F& body) const {
    const int64_t above = row0 * g.stride - g.padding();
    const int64_t begin = std::max<int64_t>(0, -above), end = std::min(rows, g.height - above);
    for (int64_t r = begin; r < end; ++r)
      for (const Run& run : runs) body(row_offset[r] + run.offset, above + r, run);
  }

  template <class T>
  void fill(A* to, const T* plane, int64_t row0) const {
    for_each_run(row0, [&](int64_t at, int64_t row, const Run& run) {
      const T* from = plane + row * g.width + run.column;
      if (g.stride == 1) return load_row(to + at, from, run.count);
      for (int64_t i = 0; i < run.count; ++i) to[at + i] = widen(from[i * g.stride]);
    });
  }

  template <class T>
  void drain(const A* from, T* plane, int64_t row0) const {
    for_each_run(row0, [&](int64_t at, int64_t row, const Run& run) {
      T* to = plane + row * g.width + run.column;
      for (int64_t i = 0; i < run.count; ++i) to[i * g.stride] = narrow<T>(from[at + i]);
    });
  }
};

// A tile of the spatial filter of one group, to[t * plane + i * pitch + j], widened.
template <class T>
void fill_spatial(Sum<T>* to, int64_t plane, int64_t pitch, const Geometry& g, const T* filter,
                  const SpatialStrides& strides, int64_t image, int64_t group, int64_t row0,
                  int64_t row1, Sum<T> neutral) {
  for (int64_t t = 0; t < g.taps(); ++t)
    for (int64_t row = row0; row < row1; ++row) {
      Sum<T>* line = to + t * plane + (row - row0) * pitch;
      if (filter == nullptr) {
        std::fill(line, line + g.out_width, neutral);
        continue;
      }
      const T* from =
          filter + image * strides.batch + (group * g.taps() + t) * strides.tap + row * strides.row;
      if (strides.column == 1)
        load_row(line, from, g.out_width);
      else
        for (int64_t j = 0; j < g.out_width; ++j) line[j] = widen(from[j * strides.column]);
    }
}

// Taps of NC channels side by side, to[t * NC + n]; with reversed, in the order of the mirrored
// filter.
template <int NC, class T>
void fill_channel(Sum<T>* to, const T* filter, int64_t taps, bool reversed, Sum<T> neutral) {
  for (int64_t t = 0; t < taps; ++t)
    for (int n = 0; n < NC; ++n)
      to[t * NC + n] =
          filter == nullptr ? neutral : widen(filter[n * taps + (reversed ? taps - 1 - t : t)]);
}

// out[n][i, j] = sum_t x[n][x_offset[t] + i, j] * (c[t, n] o s[s_offset[t] + i, j]) for NC channels
// and J vectors from column j on.
template <class T, class Combine, int NC, int J>
DDF_INLINE void filter_vectors(int64_t taps, const int64_t* x_offset, const int64_t* s_offset,
                               const Sum<T>* x, int64_t x_size, const Sum<T>* s, const Sum<T>* c,
                               T* out, int64_t out_size, int64_t room) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  V sums[NC][J] = {};
  for (int64_t t = 0; t < taps; ++t) {
    V spatial[J];
    DDF_UNROLL
    for (int j = 0; j < J; ++j) spatial[j] = load<L>(s + s_offset[t] + j * L);
    DDF_UNROLL
    for (int n = 0; n < NC; ++n) {
      const V channel = splat<A, L>(c[t * NC + n]);
      const A* from = x + n * x_size + x_offset[t];
      DDF_UNROLL
      for (int j = 0; j < J; ++j)
        sums[n][j] += load<L>(from + j * L) * Combine::combine(channel, spatial[j]);
    }
  }
  DDF_UNROLL
  for (int n = 0; n < NC; ++n) DDF_UNROLL
  for (int j = 0; j < J; ++j) store_first<L>(out + n * out_size + j * L, sums[n][j], room - j * L);
}

// Filters rows of NC channels. A vector that runs over the end of its row is overwritten by the
// next row; the last ones of the tile store just what is theirs.
template <class T, class Combine, int NC>
void filter_rows(const Geometry& g, int64_t rows, int64_t width, const int64_t* x_offset,
                 int64_t x_pitch, const Sum<T>* x, int64_t x_size, const int64_t* s_offset,
                 int64_t s_pitch, const Sum<T>* s, const Sum<T>* c, T* out, int64_t out_size) {
  constexpr int L = kLanes<Sum<T>>;
  for (int64_t i = 0; i < rows; ++i) {
    int64_t j = 0;
    for (; j + L < width; j += 2 * L)
      filter_vectors<T, Combine, NC, 2>(g.taps(), x_offset, s_offset, x + i * x_pitch + j, x_size,
                                        s + i * s_pitch + j, c, out + i * width + j, out_size,
                                        (rows - i) * width - j);
    if (j < width)
      filter_vectors<T, Combine, NC, 1>(g.taps(), x_offset, s_offset, x + i * x_pitch + j, x_size,
                                        s + i * s_pitch + j, c, out + i * width + j, out_size,
                                        (rows - i) * width - j);
  }
}

// Calls body with the number of channels as a constant: four at a time, then one by one.
template <class F>
void for_each_channels(int64_t begin, int64_t end, const F& body) {
  int64_t c = begin;
  for (; c + 4 <= end; c += 4) body(c, std::integral_constant<int, 4>());
  for (; c < end; ++c) body(c, std::integral_constant<int, 1>());
}

template <class T, class Combine>
void forward_planes(const Forward& f, ParallelFor run) {
  using A = Sum<T>;
  const Geometry& g = f.geometry;
  const int64_t pitch = round_up(g.out_width, kLanes<A>);
  const Plan plan(g, g.taps() * pitch * static_cast<int64_t>(sizeof(A)));
  const auto* features = static_cast<const T*>(f.features);
  const auto* channel_filter = static_cast<const T*>(f.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(f.spatial_filter);
  auto* output = static_cast<T*>(f.output);
  const int64_t out_size = g.out_height * g.out_width;

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const Window<A> window(g, plan.rows);
    const int64_t plane = plan.rows * pitch;
    Scratch<A> spatial(g.taps() * plane), channel(g.taps() * 4);
    std::vector<int64_t> s_offset(static_cast<size_t>(g.taps()));
    for (int64_t t = 0; t < g.taps(); ++t) s_offset[t] = t * plane;
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      // Padding differs from tile to tile.
      Scratch<A> x(4 * window.size);
      fill_spatial(spatial.get(), plane, pitch, g, spatial_filter, f.spatial_strides, item.image,
                   item.group, item.row0, item.row1, A(Combine::kNeutral));
      for_each_channels(item.channel0, item.channel1, [&](int64_t c, auto count) {
        constexpr int NC = decltype(count)::value;
        const int64_t first = item.image * g.channels + c;
        fill_channel<NC>(channel.get(),
                         channel_filter ? channel_filter + first * g.taps() : nullptr, g.taps(),
                         false, A(Combine::kNeutral));
        for (int n = 0; n < NC; ++n)
          window.fill(x + n * window.size, features + (first + n) * g.height * g.width, item.row0);
        filter_rows<T, Combine, NC>(g, item.row1 - item.row0, g.out_width, window.offset.data(),
                                    window.pitch, x, window.size, s_offset.data(), pitch, spatial,
                                    channel, output + first * out_size + item.row0 * g.out_width,
                                    out_size);
      });
    }
  });
}

// Stride 1: the same filtering of the output's gradient with the mirrored filter, each tap of which
// reads the spatial filter where it reads the gradient.
template <class T, class Combine>
void grad_features_planes(const Backward& b, ParallelFor run) {
  using A = Sum<T>;
  const Geometry& g = b.geometry;
  const int64_t pitch = round_up(g.out_width, kLanes<A>) + (g.kernel - 1) * g.dilation;
  const Plan plan(g, g.taps() * pitch * static_cast<int64_t>(sizeof(A)));
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  auto* grad_features = static_cast<T*>(b.grad_features);
  const int64_t size = g.height * g.width;

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const Window<A> window(g, plan.rows);
    Scratch<A> channel(g.taps() * 4);
    std::vector<int64_t> s_offset(static_cast<size_t>(g.taps()));
    for (int64_t t = 0; t < g.taps(); ++t)
      s_offset[t] = (g.taps() - 1 - t) * window.size + window.offset[t];
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      Scratch<A> x(4 * window.size), spatial(g.taps() * window.size);
      const int64_t above = std::max<int64_t>(item.row0 - g.padding(), 0);
      const int64_t below = std::min(item.row1 + g.padding(), g.height);
      const int64_t inside = window.row_offset[above - (item.row0 - g.padding())] + g.padding();
      fill_spatial(spatial + inside, window.size, window.pitch, g, spatial_filter,
                   b.spatial_strides, item.image, item.group, above, below, A(Combine::kNeutral));
      for_each_channels(item.channel0, item.channel1, [&](int64_t c, auto count) {
        constexpr int NC = decltype(count)::value;
        const int64_t first = item.image * g.channels + c;
        fill_channel<NC>(channel.get(),
                         channel_filter ? channel_filter + first * g.taps() : nullptr, g.taps(),
                         true, A(Combine::kNeutral));
        for (int n = 0; n < NC; ++n)
          window.fill(x + n * window.size, grad + (first + n) * size, item.row0);
        filter_rows<T, Combine, NC>(g, item.row1 - item.row0, g.width, window.offset.data(),
                                    window.pitch, x, window.size, s_offset.data(), window.pitch,
                                    spatial, channel,
                                    grad_features + first * size + item.row0 * g.width, size);
      });
    }
  });
}

// Any stride: every output pixel adds to the window of a whole plane, one channel at a time.
template <class T, class Combine>
void grad_features_strided_planes(const Backward& b, ParallelFor run) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  Geometry g = b.geometry;
  const int64_t pitch = round_up(g.out_width, L), plane = g.out_height * pitch;
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  auto* grad_features = static_cast<T*>(b.grad_features);
  Plan plan(g, 1);
  plan.tiles = 1;
  plan.rows = g.out_height;
  plan.items = g.batch * g.groups * plan.chunks;

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const Window<A> window(g, g.out_height);
    Scratch<A> spatial(g.taps() * plane), dy(plane), dx(window.size);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      fill_spatial(spatial.get(), plane, pitch, g, spatial_filter, b.spatial_strides, item.image,
                   item.group, 0, g.out_height, A(Combine::kNeutral));
      for (int64_t c = item.channel0; c < item.channel1; ++c) {
        const int64_t first = item.image * g.channels + c;
        const T* from = grad + first * g.out_height * g.out_width;
        for (int64_t i = 0; i < g.out_height; ++i)
          load_row(dy + i * pitch, from + i * g.out_width, g.out_width);
        std::fill(dx.get(), dx + window.size, A(0));
        for (int64_t t = 0; t < g.taps(); ++t) {
          const A tap =
              channel_filter ? widen(channel_filter[first * g.taps() + t]) : A(Combine::kNeutral);
          const V channel = splat<A, L>(tap);
          for (int64_t i = 0; i < g.out_height; ++i) {
            A* to = dx + window.offset[t] + i * window.pitch;
            const A* s = spatial + t * plane + i * pitch;
            for (int64_t j = 0; j < g.out_width; j += L)
              store<L>(to + j, load<L>(to + j) + load<L>(dy + i * pitch + j) *
                                                     Combine::combine(channel, load<L>(s + j)));
          }
        }
        // The features behind the last window get no gradient.
        T* to = grad_features + first * g.height * g.width;
        std::fill(to, to + g.height * g.width, narrow<T>(A(0)));
        window.drain(dx.get(), to, 0);
      }
    }
  });
}

// Adds up partial sums [parts][count], in order.
template <class T>
void sum_parts(T* to, int64_t stride, const Sum<T>* parts, int64_t number, int64_t step,
               int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Sum<T> sum = 0;
    for (int64_t p = 0; p < number; ++p) sum += parts[p * step + i];
    to[i * stride] = narrow<T>(sum);
  }
}

template <class T>
void write_grad_channel(const Geometry& g, const Plan& plan, T* grad_channel, const Sum<T>* parts,
                        ParallelFor run) {
  const int64_t count = g.channels * g.taps();
  parallel(run, g.batch * g.channels, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / g.channels, channel = index % g.channels;
      sum_parts(grad_channel + index * g.taps(), 1,
                parts + image * plan.tiles * count + channel * g.taps(), plan.tiles, count,
                g.taps());
    }
  });
}

// parts is [chunks][B * groups * taps][Ho * Wo].
template <class T>
void write_grad_spatial(const Geometry& g, const Plan& plan, T* grad_spatial,
                        const SpatialStrides& strides, const Sum<T>* parts, ParallelFor run) {
  const int64_t maps = g.groups * g.taps(), size = g.out_height * g.out_width;
  parallel(run, g.batch * maps, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index)
      for (int64_t i = 0; i < g.out_height; ++i)
        sum_parts(grad_spatial + index / maps * strides.batch + index % maps * strides.tap +
                      i * strides.row,
                  strides.column, parts + index * size + i * g.out_width, plan.chunks,
                  g.batch * maps * size, g.out_width);
  });
}

// Both filter gradients of a tile, for NC channels: with p = dy * x at each tap,
// grad_spatial[t] += p * c[t] and grad_channel[t] += p * s[t] (p alone for Add).
template <class T, class Combine, int NC>
void grad_filter_rows(const Geometry& g, int64_t rows, const Window<Sum<T>>& window,
                      const Sum<T>* x, const Sum<T>* dy, int64_t dy_size, int64_t pitch,
                      int64_t plane, const Sum<T>* s, const Sum<T>* c, Sum<T>* ds, Sum<T>* dc) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  constexpr bool kMul = std::is_same_v<Combine, Mul>;
  const int64_t whole = g.out_width / L * L;
  const auto inside = first_lanes<A, L>(g.out_width - whole);
  for (int64_t t = 0; t < g.taps(); ++t) {
    V sums[NC] = {};
    V channel[NC];
    for (int n = 0; n < NC; ++n) channel[n] = splat<A, L>(c[t * NC + n]);
    for (int64_t i = 0; i < rows; ++i) {
      const A* from = x + window.offset[t] + i * window.pitch;
      // is_whole is an integral constant; the lanes behind the end of the row may hold features
      // that are not finite, which a zero gradient would not make zero.
      const auto add = [&](int64_t j, auto is_whole) __attribute__((always_inline)) {
        const int64_t at = t * plane + i * pitch + j;
        const V spatial = load<L>(s + at);
        V total = load<L>(ds + at);
        DDF_UNROLL
        for (int n = 0; n < NC; ++n) {
          V product =
              load<L>(dy + n * dy_size + i * pitch + j) * load<L>(from + n * window.size + j);
          if constexpr (!decltype(is_whole)::value) product = inside ? product : V{};
          total += kMul ? product * channel[n] : product;
          sums[n] += kMul ? product * spatial : product;
        }
        store<L>(ds + at, total);
      };
      for (int64_t j = 0; j < whole; j += L) add(j, std::true_type());
      if (whole < g.out_width) add(whole, std::false_type());
    }
    for (int n = 0; n < NC; ++n) dc[n * g.taps() + t] = sum_lanes<A, L>(sums[n]);
  }
}

template <class T, class Combine>
void grad_filters_planes(const Backward& b, ParallelFor run) {
  using A = Sum<T>;
  const Geometry& g = b.geometry;
  const int64_t pitch = round_up(g.out_width, kLanes<A>);
  const Plan plan(g, g.taps() * pitch * static_cast<int64_t>(sizeof(A)));
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* features = static_cast<const T*>(b.features);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  const int64_t out_size = g.out_height * g.out_width;
  const int64_t maps = g.groups * g.taps();
  Scratch<A> channel_parts(g.batch * plan.tiles * g.channels * g.taps());
  const auto& strides = b.grad_spatial_strides;
  auto* grad_spatial_out = static_cast<T*>(b.grad_spatial);
  const bool in_parts = grad_spatial_out && plan.chunks > 1;
  Scratch<A> spatial_parts(in_parts ? plan.chunks * g.batch * maps * out_size : 0);

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const Window<A> window(g, plan.rows);
    const int64_t plane = plan.rows * pitch;
    Scratch<A> spatial(g.taps() * plane), channel(g.taps() * 4), dy(4 * plane);
    Scratch<A> grad_spatial(g.taps() * plane);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      const int64_t rows = item.row1 - item.row0;
      Scratch<A> x(4 * window.size);
      std::fill(grad_spatial.get(), grad_spatial + g.taps() * plane, A(0));
      fill_spatial(spatial.get(), plane, pitch, g, spatial_filter, b.spatial_strides, item.image,
                   item.group, item.row0, item.row1, A(Combine::kNeutral));
      for_each_channels(item.channel0, item.channel1, [&](int64_t c, auto count) {
        constexpr int NC = decltype(count)::value;
        const int64_t first = item.image * g.channels + c;
        fill_channel<NC>(channel.get(),
                         channel_filter ? channel_filter + first * g.taps() : nullptr, g.taps(),
                         false, A(Combine::kNeutral));
        for (int n = 0; n < NC; ++n) {
          window.fill(x + n * window.size, features + (first + n) * g.height * g.width, item.row0);
          for (int64_t i = 0; i < rows; ++i)
            load_row(dy + n * plane + i * pitch,
                     grad + (first + n) * out_size + (item.row0 + i) * g.out_width, g.out_width);
        }
        A* to = channel_parts + ((item.image * plan.tiles + item.tile) * g.channels + c) * g.taps();
        grad_filter_rows<T, Combine, NC>(g, rows, window, x, dy, plane, pitch, plane, spatial,
                                         channel, grad_spatial, to);
      });
      if (grad_spatial_out == nullptr) continue;
      for (int64_t t = 0; t < g.taps(); ++t)
        for (int64_t i = 0; i < rows; ++i) {
          const A* from = grad_spatial + t * plane + i * pitch;
          const int64_t row = item.row0 + i, map = item.group * g.taps() + t;
          if (in_parts)
            std::copy(
                from, from + g.out_width,
                spatial_parts + (((item.chunk * g.batch + item.image) * maps + map) * out_size +
                                 row * g.out_width));
          else
            sum_parts(grad_spatial_out + item.image * strides.batch + map * strides.tap +
                          row * strides.row,
                      strides.column, from, 1, 0, g.out_width);
        }
    }
  });
  if (b.grad_channel)
    write_grad_channel(g, plan, static_cast<T*>(b.grad_channel), channel_parts.get(), run);
  if (in_parts) write_grad_spatial(g, plan, grad_spatial_out, strides, spatial_parts.get(), run);
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
