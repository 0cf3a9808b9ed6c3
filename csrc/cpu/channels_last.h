// Kernels for channels_last (NHWC) features: vectors run along the channels of a pixel.
// Pixels of a row with the same taps form a strip. The taps of a strip are collected once: pointers
// to their pixels and values of the spatial filter. The channel filter is converted to the
// accumulation type, in blocks of one vector of channels with all taps. A vector has channels of
// one group or, if groups have few channels, of several: filter_spans and
// grad_filters_few_channels.
#pragma once
#include "cpu/filter_norm.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// Pixels of a whole strip; the remaining pixels of a row form strips of one pixel.
constexpr int kStrip = 4;
// The same for 3x3 windows in rows of a multiple of 7, as networks have for images of 224 pixels.
constexpr int kLongStrip = 7;

// Along one axis: for each position, the taps that lie inside the image and the positions that they
// connect to, in ascending order.
class AxisTaps {
 public:
  struct End {
    int64_t tap, at;
    int64_t pixel, subpixel;  // of `at` in an output; in features, pixel is `at`
  };
  struct Strip {
    int64_t first, count;  // positions `step` apart
    int64_t shift;         // positions from the first strip of a run of strips with the same taps
  };

  // From output positions to the features that they read.
  static AxisTaps to_features(const Geometry& g, int64_t out_size, int64_t size) {
    return AxisTaps(out_size, g.kernel, 1, 1, g.stride, [&](int64_t position, int64_t tap) {
      const int64_t at = position * g.stride + tap * g.dilation - g.padding();
      return at < size ? at : -1;
    });
  }
  // From feature positions to the outputs that read them, out_size for each subpixel. Taps are in
  // reverse order.
  static AxisTaps to_output(const Geometry& g, int64_t size, int64_t out_size) {
    return AxisTaps(size, g.kernel, g.scale, g.stride, g.scale, [&](int64_t position, int64_t tap) {
      const int64_t from = position + g.padding() - (g.kernel - 1 - tap) * g.dilation;
      return from >= 0 && from % g.stride == 0 && from / g.stride < out_size ? from / g.stride : -1;
    });
  }

  // By the same tap, positions `step` apart connect to positions `advance` apart.
  int64_t step, advance;

  const End* begin(int64_t position) const { return ends_.data() + first_[position]; }
  const End* end(int64_t position) const { return ends_.data() + first_[position + 1]; }

  std::vector<Strip> strips() const {
    const int64_t size = static_cast<int64_t>(first_.size()) - 1;
    std::vector<Strip> strips;
    for (int64_t phase = 0; phase < std::min(step, size); ++phase)
      for (int64_t position = phase; position < size; position += strips.back().count * step) {
        int64_t count = 1;
        while (count < kStrip && position + count * step < size &&
               has_same_taps(position, position + count * step))
          ++count;
        int64_t shift = 0;
        if (position > phase && has_same_taps(position - step, position))
          shift = strips.back().shift + strips.back().count;
        strips.push_back({position, count == kStrip ? count : 1, shift});
      }
    return strips;
  }

 private:
  template <class F>
  AxisTaps(int64_t size, int64_t kernel, int64_t scale, int64_t step, int64_t advance,
           const F& other_end)
      : step(step), advance(advance) {
    for (int64_t position = 0; position < size; ++position) {
      first_.push_back(static_cast<int64_t>(ends_.size()));
      for (int64_t tap = 0; tap < kernel; ++tap)
        if (const int64_t pixel = other_end(position, tap); pixel >= 0)
          for (int64_t subpixel = 0; subpixel < scale; ++subpixel)
            ends_.push_back({tap, pixel * scale + subpixel, pixel, subpixel});
    }
    first_.push_back(static_cast<int64_t>(ends_.size()));
  }

  bool has_same_taps(int64_t a, int64_t b) const {
    return std::equal(begin(a), end(a), begin(b), end(b),
                      [](const End& x, const End& y) { return x.tap == y.tap; });
  }

  std::vector<int64_t> first_;
  std::vector<End> ends_;
};

// The taps of a strip that lie inside the image.
template <class T>
struct Taps {
  explicit Taps(int64_t taps)
      : pixel(new const T*[taps]),
        filter(new int64_t[taps]),
        spatial(new Accumulate<T>[taps * kStrip]),
        tap(new int64_t[taps]) {}

  int64_t count = 0;
  std::unique_ptr<const T*[]> pixel;  // of each tap, for the first pixel of the strip
  int64_t advance = 0;                // from one pixel of the strip to the next
  // Of the strip, from the first one of its run, for which `pixel` and `filter` are.
  int64_t pixel_shift = 0, filter_shift = 0;
  std::unique_ptr<int64_t[]> filter;         // offsets in the spatial filter of a group, likewise
  std::unique_ptr<Accumulate<T>[]> spatial;  // of one group, [count][pixels of the strip]
  std::unique_ptr<int64_t[]> tap;            // in the blocks of the channel filter
};

// The spatial filter of a group of one of batch * subpixels images, or null.
template <class T>
const T* filter_of_group(const T* filter, const SpatialStrides& strides, const Geometry& g,
                         int64_t image, int64_t group) {
  return filter ? filter + strides.start(image, g.subpixels()) + group * g.taps() * strides.tap
                : nullptr;
}

// Whether features, output and spatial filters fit in the caches of a processor.
template <class T>
bool fits_in_caches(const Geometry& g) {
  const int64_t outputs = g.subpixels() * g.out_height * g.out_width;
  const int64_t values =
      (g.height * g.width + outputs) * g.channels + outputs * g.groups * g.taps();
  return g.batch * values * static_cast<int64_t>(sizeof(T)) <= kCacheBytes;
}

// Collects the taps of strips. The spatial filter belongs to output pixels: those of the strip
// (own_filter, forward) or those that the taps connect to (grad_features).
struct Gather {
  Geometry g;
  bool own_filter;
  int64_t width;  // of the image that the taps read
  AxisTaps rows, columns;

  Gather(const Geometry& g, bool own_filter)
      : g(g),
        own_filter(own_filter),
        width(own_filter ? g.width : g.scale * g.out_width),
        rows(own_filter ? AxisTaps::to_features(g, g.out_height, g.height)
                        : AxisTaps::to_output(g, g.height, g.out_height)),
        columns(own_filter ? AxisTaps::to_features(g, g.out_width, g.width)
                           : AxisTaps::to_output(g, g.width, g.out_width)) {}

  // The taps of the strip that starts at (row, column), for a filter with the given strides.
  template <class T>
  void locate(Taps<T>& taps, const T* image, const SpatialStrides& strides, int64_t row,
              const AxisTaps::Strip& strip) const {
    taps.advance = columns.advance * g.channels;
    taps.pixel_shift = strip.shift * taps.advance;
    taps.filter_shift = strip.shift * strides.column;
    if (strip.shift) return;
    const int64_t column = strip.first;
    int64_t u = 0;
    for (const auto* r = rows.begin(row); r != rows.end(row); ++r)
      for (const auto* c = columns.begin(column); c != columns.end(column); ++c, ++u) {
        const int64_t t = r->tap * g.kernel + c->tap;
        const int64_t subpixel = r->subpixel * g.scale + c->subpixel;
        taps.tap[u] = subpixel * g.taps() + t;
        taps.pixel[u] = image + (r->at * width + c->at) * g.channels;
        taps.filter[u] = own_filter
                             ? t * strides.tap + row * strides.row + column * strides.column
                             : subpixel * strides.subpixel + (g.taps() - 1 - t) * strides.tap +
                                   r->pixel * strides.row + c->pixel * strides.column;
      }
    taps.count = u;
  }

  // Prefetches the filters of all groups that the next strip is the first to read. Processors do
  // not foresee them, because the groups of a vector are read tap by tap.
  template <class T>
  DDF_INLINE void prefetch_filters(const T* filter, const SpatialStrides& strides, int64_t row,
                                   const AxisTaps::Strip& strip) const {
    const int64_t below = own_filter ? row : (row + g.padding()) / g.stride;
    const int64_t after = own_filter ? strip.first : (strip.first + g.padding()) / g.stride;
    const int64_t columns = std::min(strip.count, g.out_width - after - strip.count);
    if (strides.tap != 1 || below >= g.out_height || columns <= 0) return;
    prefetch_rows<3>(filter + below * strides.row + (after + strip.count) * strides.column,
                     strides.column, columns, g.groups * g.taps());
  }

  // Prefetches the pixels that the next strip is the first to read.
  template <class T>
  DDF_INLINE void prefetch_pixels(const T* image, int64_t row, const AxisTaps::Strip& strip) const {
    const int64_t extent = (g.kernel - 1) * g.dilation;
    int64_t last, step, count, first_column, column_count;
    if (own_filter) {
      // Of rows and columns `stride` apart, ceil(stride / dilation) taps read new ones.
      last = row * g.stride - g.padding() + extent;
      step = g.dilation;
      count = std::min(g.kernel, ceil_div(g.stride, g.dilation));
      first_column = (strip.first + strip.count - 1) * g.stride - g.padding() + extent + 1;
      column_count = strip.count * g.stride;
    } else {
      if ((row + g.padding()) % g.stride || strip.first % g.stride) return;
      last = ((row + g.padding()) / g.stride + 1) * g.scale - 1;
      step = 1;
      count = g.scale;
      first_column = ((strip.first + g.padding()) / g.stride + strip.count) * g.scale;
      column_count = strip.count * g.scale;
    }
    const int64_t height = own_filter ? g.height : g.scale * g.out_height;
    column_count = std::min(column_count, width - first_column);
    if (first_column < 0 || column_count <= 0) return;
    for (int64_t i = 0; i < count; ++i)
      if (const int64_t at = last - i * step; at >= 0 && at < height)
        prefetch_rows<3>(image + (at * width + first_column) * g.channels, g.channels, column_count,
                         g.channels);
  }

  // The values of a group's filter at the taps of a strip of P pixels, `step` apart.
  template <int P, class T, class F>
  DDF_INLINE void read_filter(Taps<T>& taps, const F* filter, int64_t step) const {
    filter += taps.filter_shift;
    Accumulate<T>* to = taps.spatial.get();
    for (int64_t u = 0; u < taps.count; ++u, to += P)
      for (int p = 0; p < P; ++p) to[p] = widen(filter[taps.filter[u] + p * step]);
  }
};

// The channel filter of channels [channel0, channel1) of one of batch * subpixels images,
// to[(v * block_taps + t) * L + lane]; lanes after the last channel are zero. `reversed`: taps in
// reverse order.
template <class T>
void fill_channel_blocks(Accumulate<T>* to, int64_t block_taps, const Geometry& g, const T* filter,
                         int64_t image, int64_t channel0, int64_t channel1, bool reversed,
                         Accumulate<T> neutral) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t taps = g.taps();
  for (int64_t c = channel0; c < channel1; c += L, to += block_taps * L) {
    const int64_t lanes = std::min<int64_t>(L, channel1 - c);
    if (lanes < L) std::fill(to, to + taps * L, A(0));
    if (filter)
      transpose(reversed ? to + (taps - 1) * L : to, reversed ? -L : L,
                filter + (image * g.channels + c) * taps, taps, lanes, taps);
    else
      for (int64_t t = 0; t < taps; ++t) std::fill_n(to + t * L, lanes, neutral);
  }
}

// out[p][c] = sum over the collected taps of pixel[c] * (c[t, c] o spatial[p]) for the P pixels of
// a strip, out_step apart, and count channels, plus the bias c[all_taps, c], at least output_min.
template <int P, class T, class Combine>
DDF_INLINE void filter_strip(const Taps<T>& taps, int64_t all_taps, int64_t first,
                             const Accumulate<T>* channel, Accumulate<T> output_min, T* out,
                             int64_t out_step, int64_t count) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  const int64_t number = taps.count, advance = taps.advance;
  first += taps.pixel_shift;
  // wide is an integral constant: whether c starts a whole vector of channels.
  const auto filter = [&](int64_t c, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : count - c;
    const A* block = channel + c * (all_taps + 1);
    const V bias = load<L>(block + all_taps * L);
    V sums[P];
    DDF_UNROLL
    for (int p = 0; p < P; ++p) sums[p] = bias;
    for (int64_t u = 0; u < number; ++u) {
      const V tap = load<L>(block + taps.tap[u] * L);
      const T* from = taps.pixel[u] + first + c;
      const A* spatial = taps.spatial.get() + u * P;
      DDF_UNROLL
      for (int p = 0; p < P; ++p)
        sums[p] +=
            load_first<L>(from + p * advance, room) * Combine::weight(tap, splat<A, L>(spatial[p]));
    }
    DDF_UNROLL
    for (int p = 0; p < P; ++p)
      store_first<L>(out + p * out_step + c, clamp_min(sums[p], splat<A, L>(output_min)), room);
  };
  int64_t c = 0;
  for (; c + L <= count; c += L) filter(c, std::true_type());
  if (c < count) filter(c, std::false_type());
}

// The groups of a vector of channels. `count` of them are read, one of the numbers that
// filter_spans knows, so the first ones may have no lanes.
template <class A>
struct LaneGroups {
  static constexpr int L = kLanes<A>;

  int64_t first;
  int count;
  int start[L];  // the lane where each group starts

  LaneGroups(const Geometry& g, int64_t channel, int count)
      : first(std::min(channel / g.group_channels, g.groups - count)), count(count) {
    for (int j = 0; j < L; ++j)
      start[j] =
          static_cast<int>(std::clamp<int64_t>((first + j) * g.group_channels - channel, 0, L));
  }

  // Channels of a vector: of at most 8 groups, because more take longer than two vectors.
  static int64_t channels_of_vector(const Geometry& g) {
    return std::min<int64_t>(L, 8 * g.group_channels);
  }
  static LaneGroups of_vector(const Geometry& g, int64_t channel) {
    const int64_t end = std::min(channel + channels_of_vector(g), g.channels);
    const int64_t last = (end - 1) / g.group_channels;
    const int64_t count = last - channel / g.group_channels + 1;
    for (const int n : {2, 3, 4, 6, 8})
      if (count <= n && n <= g.groups) return {g, channel, n};
    return {g, channel, static_cast<int>(count)};
  }
};

// Whether vectors can span groups.
template <class A>
bool can_span_groups(const Geometry& g) {
  return g.groups > 1 && g.group_channels < kLanes<A>;
}

// Values of N groups, `step` apart, in the lanes of their channels; of `count` groups if N is 0.
template <int L, int N, class F>
DDF_INLINE Vector<Accumulate<F>, L> load_of_groups(const F* values, int64_t step,
                                                   const LaneMask<F, L>* from_lane, int count) {
  // x86 addresses scale an index by 1, 2, 4 or 8 only.
  int64_t step3 = 3 * step;
  DDF_OPAQUE(step3);
  auto lanes = splat_element<L>(values[0]);
  DDF_UNROLL
  for (int j = 1; j < N; ++j) {
    if (j % 4 == 0) {
      values += 4 * step;
      DDF_OPAQUE(values);
    }
    const F value = values[j % 4 == 3 ? step3 : j % 4 * step];
    lanes = select_lanes<F, L>(from_lane[j], splat_element<L>(value), lanes);
  }
  for (int j = 1; N == 0 && j < count; ++j)
    lanes = select_lanes<F, L>(from_lane[j], splat_element<L>(values[j * step]), lanes);
  return widen_elements<F, L>(lanes);
}

// The same for a vector of channels of several groups, N of which are read. The filters of these
// groups start at `filter`, group_step apart, and pixel_step for each pixel of the strip.
template <int P, int N, class T, class Combine, class F>
DDF_INLINE void filter_span(const Taps<T>& taps, int64_t all_taps, int64_t first, const F* filter,
                            int64_t group_step, int64_t pixel_step,
                            const LaneGroups<Accumulate<T>>& groups, const Accumulate<T>* block,
                            Accumulate<T> output_min, T* out, int64_t out_step, int64_t room) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  LaneMask<F, L> from_lane[L];
  DDF_UNROLL
  for (int j = 1; j < (N ? N : L); ++j) from_lane[j] = lanes_from<F, L>(groups.start[j]);
  const V bias = load<L>(block + all_taps * L);
  const int64_t advance = taps.advance;
  first += taps.pixel_shift;
  filter += taps.filter_shift;
  room = std::min<int64_t>(room, L);
  V sums[P];
  DDF_UNROLL
  for (int p = 0; p < P; ++p) sums[p] = bias;
  for (int64_t u = 0; u < taps.count; ++u) {
    const V tap = load<L>(block + taps.tap[u] * L);
    const T* from = taps.pixel[u] + first;
    const F* values = filter + taps.filter[u];
    DDF_UNROLL
    for (int p = 0; p < P; ++p) {
      const V spatial = load_of_groups<L, N>(values, group_step, from_lane, groups.count);
      sums[p] += load_up_to<L>(from, room) * Combine::weight(tap, spatial);
      values += pixel_step;
      from += advance;
      DDF_OPAQUE(values);
      DDF_OPAQUE(from);
    }
  }
  DDF_UNROLL
  for (int p = 0; p < P; ++p)
    store_first<L>(out + p * out_step, clamp_min(sums[p], splat<A, L>(output_min)), room);
}

// All channels of a strip, whose vectors span groups and start `step` channels apart.
template <int P, class T, class Combine, class F>
DDF_INLINE void filter_spans(const Taps<T>& taps, int64_t all_taps,
                             const std::vector<LaneGroups<Accumulate<T>>>& lanes, const F* filter,
                             int64_t group_step, int64_t pixel_step, const Accumulate<T>* channel,
                             Accumulate<T> output_min, T* out, int64_t out_step, int64_t channels,
                             int64_t step) {
  constexpr int64_t L = kLanes<Accumulate<T>>;
  int64_t c = 0;
  for (const auto& groups : lanes) {
    // The vector may start in the upper half of its channel block.
    const Accumulate<T>* const block = channel + c / L * L * (all_taps + 1) + c % L;
    const auto span = [&](auto number) {
      constexpr int N = decltype(number)::value;
      if constexpr (N <= L)
        filter_span<P, N, T, Combine>(taps, all_taps, c, filter + groups.first * group_step,
                                      group_step, pixel_step, groups, block, output_min, out + c,
                                      out_step, std::min(step, channels - c));
    };
    switch (groups.count) {
      case 2:
        span(std::integral_constant<int, 2>());
        break;
      case 3:
        span(std::integral_constant<int, 3>());
        break;
      case 4:
        span(std::integral_constant<int, 4>());
        break;
      case 6:
        span(std::integral_constant<int, 6>());
        break;
      case 8:
        span(std::integral_constant<int, 8>());
        break;
      default:
        span(std::integral_constant<int, 0>());
    }
    c += step;
  }
}

// Where the pixels of a row find the taps of a 3x3 window in a spatial filter: their own
// (own_filter, forward) or those of the pixels in the window, in reverse order (grad_features).
struct Taps3x3 {
  int64_t first;               // the first tap of the row's first pixel
  int64_t row, column, pixel;  // steps to the next row and column of taps, and to the next pixel

  Taps3x3(bool own_filter, const SpatialStrides& s, int64_t at)
      : first(own_filter ? at * s.row : 8 * s.tap + (at - 1) * s.row - s.column),
        row(own_filter ? 3 * s.tap : s.row - 3 * s.tap),
        column(own_filter ? s.tap : s.column - s.tap),
        pixel(s.column) {}
};

// The pixels that a strip of 3x3 windows reads: the first one, the steps in a row and to the next
// row, and which rows and columns lie outside the image. And what is prefetched for the next strip.
template <class T>
struct Windows3x3 {
  const T* pixels;
  int64_t advance, line;
  bool above, below;
  bool prefetches_pixels, prefetches_output;
  bool left = true, right = true;

  bool has_row(int r) const { return !(r == 0 ? above : r == 2 && below); }
  // Of the columns of P windows.
  template <int P>
  bool has_column(int q) const {
    return !(q == 0 ? left : q == P + 1 && right);
  }
};

// The same for 3x3 windows, whose pixels are loaded once for the three taps of a row. The value of
// tap (r, x) for pixel p is spatial[r * spatial_row + x * kColumn + p * 9].
template <int P, int kColumn, bool kIsEdge, class T, class Combine>
DDF_INLINE void filter_strip_3x3(const Windows3x3<T>& windows, const Accumulate<T>* spatial,
                                 int64_t spatial_row, const Accumulate<T>* channel,
                                 Accumulate<T> output_min, T* out, int64_t out_step,
                                 int64_t count) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  constexpr int64_t kLine = 64 / sizeof(T);
  const Steps in_row(windows.advance), in_out(out_step);
  const auto filter = [&](int64_t c, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : count - c;
    const A* block = channel + c * 10;
    const A* weights = spatial;
    const T* row = windows.pixels + c;
    T* to = out + c;
    DDF_OPAQUE(to);
    const V bias = load<L>(block + 9 * L);
    V sums[P];
    DDF_UNROLL
    for (int p = 0; p < P; ++p) sums[p] = bias;
    DDF_UNROLL
    for (int r = 0; r < 3; ++r, row += windows.line, weights += spatial_row) {
      if (!windows.has_row(r)) continue;
      DDF_OPAQUE(row);
      DDF_OPAQUE(weights);
      // What the next strip writes, and reads in the last row, if a cache line starts at c. Other
      // rows are in the cache.
      if (r == 1 && (L >= kLine || c % kLine == 0)) {
        if (windows.prefetches_pixels) {
          const T* from_next = in_row(row + windows.line, P + 1);
          DDF_OPAQUE(from_next);
          DDF_UNROLL
          for (int p = 0; p < P; ++p) __builtin_prefetch(in_row(from_next, p));
        }
        if (windows.prefetches_output) {
          T* to_next = in_out(to, P);
          DDF_OPAQUE(to_next);
          DDF_UNROLL
          for (int p = 0; p < P; ++p) __builtin_prefetch(in_out(to_next, p), 1);
        }
      }
      V tap[3];
      DDF_UNROLL
      for (int x = 0; x < 3; ++x) tap[x] = load<L>(block + (r * 3 + x) * L);
      const T* next = in_row(row, 4);
      DDF_OPAQUE(next);
      DDF_UNROLL
      for (int q = 0; q < P + 2; ++q) {
        if (kIsEdge && !windows.template has_column<P>(q)) continue;
        V value = load_first<L>(q < 4 ? in_row(row, q) : in_row(next, q - 4), room);
        DDF_OPAQUE_VECTOR(value);
        DDF_UNROLL
        for (int x = 0; x < 3; ++x)
          if (const int p = q - x; p >= 0 && p < P)
            sums[p] += value * Combine::weight(tap[x], splat<A, L>(weights[x * kColumn + p * 9]));
      }
    }
    DDF_UNROLL
    for (int p = 0; p < P; ++p)
      store_first<L>(in_out(to, p), clamp_min(sums[p], splat<A, L>(output_min)), room);
  };
  int64_t c = 0;
  for (; c + L <= count; c += L) filter(c, std::true_type());
  if (c < count) filter(c, std::false_type());
}

// A row of `columns` pixels, in strips of P pixels; the pixels of `windows` are those of the first
// strip.
template <int P, class T, class Combine, class F>
__attribute__((noinline)) void filter_row_3x3(Windows3x3<T> windows, const F* filter,
                                              const Taps3x3& taps, const Accumulate<T>* channel,
                                              Accumulate<T> output_min, T* out, int64_t out_step,
                                              int64_t columns, int64_t count) {
  using A = Accumulate<T>;
  const T* const first_pixels = windows.pixels;
  const auto filter_strip = [&](int64_t column) __attribute__((always_inline)) {
    windows.pixels = first_pixels + column * windows.advance;
    windows.left = column == 0;
    windows.right = column + P == columns;
    const int64_t first = taps.first + column * taps.pixel;
    A values[9 * P];
    const A* spatial = values;
    int64_t spatial_row = 3;
    const auto filter_by = [&](auto tap_column) __attribute__((always_inline)) {
      const auto filter = [&](auto is_edge) __attribute__((always_inline)) {
        filter_strip_3x3<P, decltype(tap_column)::value, decltype(is_edge)::value, T, Combine>(
            windows, spatial, spatial_row, channel, output_min, out + column * out_step, out_step,
            count);
      };
      if (windows.left || windows.right)
        filter(std::true_type());
      else
        filter(std::false_type());
    };
    // The taps of one group in a channels_last filter, in order or in reverse order.
    const bool is_in_place =
        std::is_same_v<F, A> && taps.pixel == 9 && (taps.column == 1 || taps.column == 8);
    if constexpr (std::is_same_v<F, A>)
      if (is_in_place) {
        spatial = filter + first;
        spatial_row = taps.row;
        if (taps.column == 8) return filter_by(std::integral_constant<int, 8>());
      }
    if (!is_in_place)
      for (int r = 0; r < 3; ++r)
        for (int x = 0; x < 3; ++x)
          for (int p = 0; p < P; ++p)
            // Taps outside the image may lie outside the filter.
            values[p * 9 + r * 3 + x] =
                windows.has_row(r) && windows.template has_column<P>(p + x)
                    ? widen(filter[first + p * taps.pixel + r * taps.row + x * taps.column])
                    : A(0);
    filter_by(std::integral_constant<int, 1>());
  };
  // The last strip may compute pixels of the one before it again.
  for (int64_t column = 0; column < columns; column += P)
    filter_strip(std::min(column, columns - P));
}

// FilterNorm of the channel blocks of channels [channel0, channel1); stores the bias after the taps
// of each.
template <class A>
void normalize_channel_blocks(A* blocks, int64_t taps, int64_t channel0, int64_t channel1,
                              const TypedPackOptions<A>& pack) {
  constexpr int L = kLanes<A>;
  if (!pack.normalize && !pack.bias) return;
  for (int64_t c = channel0; c < channel1; c += L, blocks += (taps + 1) * L) {
    const int64_t lanes = std::min<int64_t>(L, channel1 - c);
    pack.template normalize_channels<L>(blocks, taps, c, lanes);
    for (int64_t lane = 0; pack.bias && lane < lanes; ++lane)
      blocks[taps * L + lane] = pack.bias[c + lane];
  }
}

// FilterNorm of a row of a group's spatial filter, to[t * pitch + j].
template <class T>
void normalize_row(Accumulate<T>* to, int64_t pitch, int64_t columns, int64_t taps, const T* filter,
                   const SpatialStrides& strides, const TypedPackOptions<Accumulate<T>>& pack) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  for (int64_t t = 0; t < taps; ++t)
    load_row(to + t * pitch, filter + t * strides.tap, columns, strides.column);
  for (int64_t j = 0; j < columns; j += L)
    standardize<A, L>(to + j, taps, pitch, pack.eps, pack.spatial_scale);
}

// Forward (own_filter) or grad_features: each pixel of `to` gathers from `from`.
template <class T>
struct Filtering {
  Geometry g;
  bool own_filter;
  const T* channel_filter;
  const T* spatial_filter;
  SpatialStrides strides;
  const T* from;
  T* to;
  TypedPackOptions<Accumulate<T>> pack;

  explicit Filtering(const Forward& f)
      : g(f.geometry),
        own_filter(true),
        channel_filter(static_cast<const T*>(f.channel_filter)),
        spatial_filter(static_cast<const T*>(f.spatial_filter)),
        strides(f.spatial_strides),
        from(static_cast<const T*>(f.features)),
        to(static_cast<T*>(f.output)),
        pack(f.pack) {}
  explicit Filtering(const Backward& b)
      : g(b.geometry),
        own_filter(false),
        channel_filter(static_cast<const T*>(b.channel_filter)),
        spatial_filter(static_cast<const T*>(b.spatial_filter)),
        strides(b.spatial_strides),
        from(static_cast<const T*>(b.grad)),
        to(static_cast<T*>(b.grad_features)) {}

  // Of one tensor, without filters.
  Filtering(const Geometry& g, bool own_filter, const SpatialStrides& strides,
            const TypedPackOptions<Accumulate<T>>& pack)
      : g(g),
        own_filter(own_filter),
        channel_filter(nullptr),
        spatial_filter(nullptr),
        strides(strides),
        from(nullptr),
        to(nullptr),
        pack(pack) {}

  // Rows and columns whose pixels are filtered, each with all of its subpixels.
  int64_t rows() const { return own_filter ? g.out_height : g.height; }
  int64_t columns() const { return own_filter ? g.out_width : g.width; }
  // Subpixels of a pixel of `to`, along one axis, and taps of one of them.
  int64_t scale() const { return own_filter ? g.scale : 1; }
  int64_t taps() const { return own_filter ? g.taps() : g.subpixels() * g.taps(); }

  const T* filter_of(int64_t image, int64_t group) const {
    return filter_of_group(spatial_filter, strides, g, image, group);
  }

  // Sizes of the channel blocks of `section` channels that are filtered together.
  int64_t block_size(int64_t section) const {
    return round_up(section, kLanes<Accumulate<T>>) * (taps() + 1);
  }
  // Sections of all channels or of those of a group. Pixels may be further apart than that.
  int64_t sections_of(int64_t section) const { return section == g.group_channels ? g.groups : 1; }
  // The channel blocks of an image, [subpixels][sections][block_size].
  void fill_blocks(Accumulate<T>* to, int64_t image, int64_t section, Accumulate<T> neutral) const {
    const int64_t size = block_size(section), sections = sections_of(section);
    for (int64_t r = 0; r < g.subpixels(); ++r)
      for (int64_t i = 0; i < sections; ++i) {
        auto* const block = own_filter ? to + (r * sections + i) * size
                                       : to + i * size + r * g.taps() * kLanes<Accumulate<T>>;
        fill_channel_blocks(block, taps() + 1, g, channel_filter, image * g.subpixels() + r,
                            i * section, (i + 1) * section, !own_filter, neutral);
        normalize_channel_blocks(block, g.taps(), i * section, (i + 1) * section, pack);
      }
  }
};

// Whether filter_rows_3x3 supports forward and grad_features.
inline bool is_3x3(const Geometry& g, bool own_filter) {
  return g.kernel == 3 && g.dilation == 1 && g.stride == 1 && !g.is_valid && g.width >= kStrip &&
         (own_filter || g.scale == 1);
}

// Rows [begin, end) of all images, for 3x3 windows.
template <class T, class Combine>
__attribute__((noinline)) void filter_rows_3x3(const Filtering<T>& f, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Geometry& g = f.g;
  const int64_t rows = g.height, columns = g.width, pitch = round_up(columns, kLanes<A>);
  const int64_t block = f.block_size(g.group_channels);
  const A neutral = A(Combine::kNeutral);
  Scratch<A> channel(g.subpixels() * g.groups * block);
  // A row of a group's normalized spatial filter, [taps][pitch].
  Scratch<A> normalized(f.pack.normalize_spatial ? 9 * pitch : 0);
  // Each group prefetches its share of what the next row writes or is the first to read, into the
  // L2 cache: one group alone touches parts of many cache lines.
  const bool is_fetched = g.groups > 1 && !fits_in_caches<T>(g);
  const bool has_whole_lines = g.group_channels * sizeof(T) % 64 == 0;
  // Channels of pixels that are a multiple of 1 KiB apart share a few sets of the L1 cache, of
  // 4 KiB in all: what is prefetched displaces what a strip reads.
  const int64_t pixel_bytes = g.channels * static_cast<int64_t>(sizeof(T));
  const bool prefetches_output = pixel_bytes % 1024 != 0;
  const bool prefetches_pixels = pixel_bytes % 2048 != 0 || !fits_in_caches<T>(g);
  const auto prefetch_share = [&](const T* next_row, int64_t count, int64_t group) {
    const int64_t share = ceil_div(count, g.groups);
    prefetch_rows(next_row + group * share, share, 1, share);
  };
  int64_t filled = -1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / rows, row = index % rows;
    if (image != filled) f.fill_blocks(channel, image, g.group_channels, neutral);
    filled = image;
    for (int64_t r = 0; r < g.subpixels(); ++r)
      for (int64_t group = 0; group < g.groups; ++group) {
        const int64_t first = group * g.group_channels;
        const Windows3x3<T> windows{f.from + ((index - 1) * columns - 1) * g.channels + first,
                                    g.channels,
                                    columns * g.channels,
                                    row == 0,
                                    row + 1 == rows,
                                    prefetches_pixels,
                                    prefetches_output};
        T* const to =
            f.to +
            ((index * g.scale + r / g.scale) * columns * g.scale + r % g.scale) * g.channels +
            first;
        const auto filter_row = [&](const auto* filter,
                                    const SpatialStrides& strides) __attribute__((always_inline)) {
          const auto filter_row_by = [&](auto strip) __attribute__((always_inline)) {
            filter_row_3x3<decltype(strip)::value, T, Combine>(
                windows, filter, Taps3x3(f.own_filter, strides, row),
                channel + (r * g.groups + group) * block, f.pack.output_min, to,
                g.scale * g.channels, columns, g.group_channels);
          };
          if constexpr (std::is_same_v<T, float>)
            if (columns % kLongStrip == 0)
              return filter_row_by(std::integral_constant<int, kLongStrip>());
          filter_row_by(std::integral_constant<int, kStrip>());
        };
        const T* const filter = f.filter_of(image * g.subpixels() + r, group);
        if (is_fetched && row + 1 < rows) {
          if (!has_whole_lines)
            prefetch_share(to - first + g.scale * g.scale * columns * g.channels,
                           g.scale * columns * g.channels, group);
          if (!has_whole_lines && row + 2 < rows)
            prefetch_share(f.from + (index + 2) * columns * g.channels, columns * g.channels,
                           group);
          const int64_t next = std::min(row + (f.own_filter ? 1 : 2), rows - 1);
          if (filter && f.strides.tap == 1)
            prefetch_share(f.filter_of(image * g.subpixels() + r, 0) + next * f.strides.row,
                           columns * f.strides.column, group);
        }
        if (f.pack.normalize_spatial) {
          normalize_row(normalized.get(), pitch, columns, 9, filter + row * f.strides.row,
                        f.strides, f.pack);
          filter_row(static_cast<const A*>(normalized), SpatialStrides{0, 0, pitch, 0, 1});
        } else if (filter) {
          filter_row(filter, f.strides);
        } else {
          filter_row(&neutral, SpatialStrides{0, 0, 0, 0, 0});
        }
      }
  }
}

// The strips of rows, and the groups of vectors that span groups.
template <class T>
struct RowStrips {
  Gather gather;
  std::vector<AxisTaps::Strip> strips;
  std::vector<LaneGroups<Accumulate<T>>> lanes;
  bool is_fetched;  // Whether strips prefetch for the next ones.

  // Where the tensors fit in the caches, prefetching takes up to a third longer, but nothing if
  // vectors span groups.
  RowStrips(const Filtering<T>& f, bool is_spanning)
      : gather(f.g, f.own_filter),
        strips(gather.columns.strips()),
        is_fetched(is_spanning || !fits_in_caches<T>(f.g)) {
    using Lanes = LaneGroups<Accumulate<T>>;
    for (int64_t c = 0; is_spanning && c < f.g.channels; c += Lanes::channels_of_vector(f.g))
      lanes.push_back(Lanes::of_vector(f.g, c));
  }
};

// Rows [begin, end) of all images, for any windows.
template <class T, class Combine>
__attribute__((noinline)) void filter_rows_of_strips(const Filtering<T>& f, const RowStrips<T>& of,
                                                     int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Geometry& g = f.g;
  const Gather& gather = of.gather;
  const int64_t rows = f.rows(), columns = f.columns(), all_taps = f.taps();
  const bool is_spanning = !of.lanes.empty();
  // A pixel computes all of its subpixels, or gathers from all of them at once.
  const int64_t scale = f.scale(), subpixels = scale * scale;
  const int64_t out_step = scale * gather.columns.step * g.channels;
  const int64_t from_size = (f.own_filter ? g.height : g.scale * g.out_height) * gather.width;
  const A neutral = A(Combine::kNeutral);
  // Channels that are filtered together: a group's, or all if vectors span groups.
  const int64_t section = is_spanning ? g.channels : g.group_channels;
  const int64_t sections = f.sections_of(section), block = f.block_size(section);
  Taps<T> taps(all_taps);
  // A vector that starts within a block ends after it.
  Scratch<A> channel(subpixels * sections * block + kLanes<A>);
  // A row of normalized spatial filters, [groups][taps][pitch].
  const int64_t pitch = round_up(columns, kLanes<A>);
  Scratch<A> normalized(f.pack.normalize_spatial ? g.groups * g.taps() * pitch : 0);
  int64_t filled = -1;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t image = index / rows, row = index % rows;
    const T* pixels = f.from + image * from_size * g.channels;
    if (image != filled) f.fill_blocks(channel, image, section, neutral);
    filled = image;
    for (int64_t group = 0; f.pack.normalize_spatial && group < g.groups; ++group)
      normalize_row(normalized + group * g.taps() * pitch, pitch, columns, g.taps(),
                    f.filter_of(image, group) + row * f.strides.row, f.strides, f.pack);
    for (int64_t r = 0; r < subpixels; ++r)
      for (const auto& strip : of.strips) {
        const A* const blocks = channel + r * sections * block;
        if (of.is_fetched) gather.prefetch_pixels(pixels, row, strip);
        if (of.is_fetched && !f.pack.normalize_spatial && f.spatial_filter)
          gather.prefetch_filters(f.filter_of(image * g.subpixels() + r, 0), f.strides, row, strip);
        const auto filter_as = [&](auto pixels_of_strip, const auto* filter,
                                   const SpatialStrides& strides) __attribute__((always_inline)) {
          constexpr int P = decltype(pixels_of_strip)::value;
          T* const out = f.to + ((index * scale + r / scale) * scale * columns +
                                 strip.first * scale + r % scale) *
                                    g.channels;
          if (of.is_fetched) prefetch_rows<3>(out + P * out_step, out_step, P, g.channels);
          gather.locate(taps, pixels, strides, row, strip);
          if (is_spanning)
            filter_spans<P, T, Combine>(taps, all_taps, of.lanes, filter, g.taps() * strides.tap,
                                        strides.column, blocks, f.pack.output_min, out, out_step,
                                        g.channels, LaneGroups<A>::channels_of_vector(g));
          for (int64_t group = 0; !is_spanning && group < g.groups; ++group) {
            gather.template read_filter<P>(taps, filter + group * g.taps() * strides.tap,
                                           strides.column);
            filter_strip<P, T, Combine>(taps, all_taps, group * g.group_channels,
                                        blocks + group * block, f.pack.output_min,
                                        out + group * g.group_channels, out_step, g.group_channels);
          }
        };
        const auto filter = [&](auto pixels_of_strip) __attribute__((always_inline)) {
          if (f.pack.normalize_spatial)
            filter_as(pixels_of_strip, static_cast<const A*>(normalized),
                      SpatialStrides{0, 0, pitch, 0, 1});
          else if (f.spatial_filter)
            filter_as(pixels_of_strip, f.filter_of(image * g.subpixels() + r, 0), f.strides);
          else
            filter_as(pixels_of_strip, &neutral, SpatialStrides{0, 0, 0, 0, 0});
        };
        if (strip.count == kStrip)
          filter(std::integral_constant<int, kStrip>());
        else
          filter(std::integral_constant<int, 1>());
      }
  }
}

template <class T, class Combine>
void filter_channels_last(const Filtering<T>& f, bool is_spanning, ParallelFor run) {
  const int64_t rows = f.g.batch * f.rows();
  if (!is_spanning && is_3x3(f.g, f.own_filter))
    return parallel(
        run, rows, [&](int64_t begin, int64_t end) { filter_rows_3x3<T, Combine>(f, begin, end); });
  const RowStrips<T> strips(f, is_spanning);
  parallel(run, rows, [&](int64_t begin, int64_t end) {
    filter_rows_of_strips<T, Combine>(f, strips, begin, end);
  });
}

// Pointers for S taps of a strip of pixels: x, s and ds, and c and dc in the channel blocks.
template <class T, int S>
struct StripTaps {
  const T* x[S];
  const Accumulate<T>* s[S];
  Accumulate<T>* ds[S];
  const Accumulate<T>* c;
  Accumulate<T>* dc;
  int64_t next;  // step to the next tap in the blocks
};

// With p = dy * x at S taps of a strip of P pixels: ds[tap][pixel] = sum over the channels of
// p * c[tap], and dc[tap] += p * s[tap][pixel] (p alone for Add). Pixels of s are kPixel apart; the
// next vector of channels of c and dc starts `block` later.
template <int P, int S, int kPixel, class T, class Combine>
DDF_INLINE void grad_filters_step(StripTaps<T, S> at, int64_t x_step, const T* dy, int64_t dy_step,
                                  int64_t block, int64_t channels) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  constexpr int K = S * (P == 3 ? 4 : P);
  const Steps x_steps(x_step), dy_steps(dy_step);
  V sums[K] = {};
  // wide is an integral constant: whether i starts a whole vector of channels.
  const auto add = [&](int64_t i, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : channels - i;
    V y[P];
    DDF_UNROLL
    for (int p = 0; p < P; ++p) y[p] = load_first<L>(dy_steps(dy + i, p), room);
    DDF_UNROLL
    for (int u = 0; u < S; ++u) {
      const V tap = load<L>(at.c + u * at.next);
      V total = load<L>(at.dc + u * at.next);
      DDF_UNROLL
      for (int p = 0; p < P; ++p) {
        const V product = y[p] * load_first<L>(x_steps(at.x[u] + i, p), room);
        const V spatial = splat<A, L>(at.s[u][p * kPixel]);
        sums[u * P + p] += Combine::grad_spatial(product, tap, spatial);
        total += Combine::grad_channel(product, tap, spatial);
      }
      store<L>(at.dc + u * at.next, total);
    }
    at.c += block;
    at.dc += block;
  };
  int64_t i = 0;
  for (; i + L <= channels; i += L) add(i, std::true_type());
  if (i < channels) add(i, std::false_type());
  A totals[K];
  sum_lanes_of_each<A, L>(sums, totals);
  for (int u = 0; u < S; ++u)
    for (int p = 0; p < P; ++p) at.ds[u][p * kPixel] = totals[u * P + p];
}

// Arguments of the filter gradients of one row of the output.
template <class T>
struct GradRow {
  using A = Accumulate<T>;
  const Geometry& g;
  const int64_t* range;  // [kernel][2]: the pixels for which a column of taps is inside the image
  const T* x;            // the first tap of the first pixel, which may lie outside
  const T* dy;
  int64_t dy_step;  // to the next pixel
  const A* s;
  int64_t s_tap;  // to the next tap of s
  A* ds;          // like s, zeros
  const A* c;     // in blocks
  A* dc;
  int64_t channels;
  int64_t ty0 = 0, ty1 = 0;  // the rows of taps inside the image
  // What the next row is the first to read, to prefetch: the first pixels of dy, if not null, and
  // of rows of x.
  const T* next_dy = nullptr;
  const T* next_x = nullptr;
  int64_t next_rows = 0;

  DDF_INLINE void prefetch_next(int64_t column) const {
    if (next_dy == nullptr) return;
    const int64_t count = std::min<int64_t>(kStrip, g.out_width - column);
    for (int64_t i = 0; i < next_rows; ++i)
      prefetch_rows(next_x + (i * g.dilation * g.width + column * g.stride) * g.channels,
                    g.channels, count * g.stride, channels);
    prefetch_rows(next_dy + column * dy_step, dy_step, count, channels);
  }
};

// Adjacent taps of a pixel in GradRow::s and GradRow::ds, for 3x3 windows.
constexpr int kTapsInner = 9;

// The pixels of s and ds are kPixel apart; if that is not 1, their taps are adjacent.
template <int kPixel, class T, class Combine>
__attribute__((noinline)) void grad_filters_row(const GradRow<T>& row) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = row.g;
  const int64_t taps = g.taps(), width = g.out_width, k = g.kernel;
  const int64_t x_step = g.stride * g.channels;
  // S taps, `apart` from each other, starting at t.
  const auto step = [&](int64_t t, int64_t apart, int64_t column, auto pixels,
                        auto number) __attribute__((always_inline)) {
    constexpr int S = decltype(number)::value, P = decltype(pixels)::value;
    StripTaps<T, S> at;
    for (int u = 0; u < S; ++u) {
      const int64_t tap = t + u * apart;
      at.x[u] = row.x + (tap / k * g.width + tap % k) * g.dilation * g.channels + column * x_step;
      at.s[u] = row.s + tap * row.s_tap + column * kPixel;
      at.ds[u] = row.ds + tap * (kPixel == 1 ? width : 1) + column * kPixel;
    }
    at.c = row.c + t * L;
    at.dc = row.dc + t * L;
    at.next = apart * L;
    grad_filters_step<P, S, kPixel, T, Combine>(at, x_step, row.dy + column * row.dy_step,
                                                row.dy_step, taps * L, row.channels);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 3> three;
  const std::integral_constant<int, kStrip> whole;
  // A column of taps.
  const auto strip = [&](int64_t tx, int64_t column, auto pixels) __attribute__((always_inline)) {
    int64_t ty = row.ty0;
    for (; ty + 2 <= row.ty1; ty += 2) step(ty * k + tx, k, column, pixels, two);
    if (ty < row.ty1) step(ty * k + tx, k, column, pixels, one);
  };
  for (int64_t column = 0; column < width; column += kStrip) {
    row.prefetch_next(column);
    if (column >= row.range[0] && column + kStrip <= row.range[2 * k - 1]) {
      int64_t t = row.ty0 * k;
      for (; t + 2 <= row.ty1 * k; t += 2) step(t, 1, column, whole, two);
      if (t < row.ty1 * k) step(t, 1, column, whole, one);
      continue;
    }
    for (int64_t tx = 0; tx < k; ++tx) {
      const int64_t first = std::max(column, row.range[2 * tx]);
      switch (std::min(column + kStrip, row.range[2 * tx + 1]) - first) {
        case kStrip:
          strip(tx, first, whole);
          break;
        case 3:
          strip(tx, first, three);
          break;
        case 2:
          strip(tx, first, two);
          break;
        case 1:
          strip(tx, first, one);
          break;
        default:
          break;
      }
    }
  }
}

// Gradients of four pixels whose taps are adjacent, L from kFirst on; lanes of rows[tap / 3] are
// [tap % 3][pixel].
template <int kFirst, class V, int... I>
DDF_INLINE V to_adjacent_taps(const V (&rows)[3], std::integer_sequence<int, I...>) {
  constexpr int kN = sizeof...(I);
  constexpr auto row_of = [](int value) { return value % 9 / 3; };
  constexpr auto lane_of = [](int value) { return value % 3 * kStrip + value / 9 % kStrip; };
  const V upper =
      DDF_SHUFFLE(rows[0], rows[1], (lane_of(kFirst + I) + (row_of(kFirst + I) == 1 ? kN : 0))...);
  return DDF_SHUFFLE(upper, rows[2], (row_of(kFirst + I) == 2 ? kN + lane_of(kFirst + I) : I)...);
}

// The same for a strip of P pixels with 3x3 windows, one row of taps at a time, whose pixels are
// loaded once. kIsEdge: the windows may reach over the ends of the row.
template <int P, bool kIsEdge, int kPixel, class T, class Combine>
DDF_INLINE void grad_filters_strip_3x3(const GradRow<T>& row, int64_t column) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  // Sums of 3 x P taps, to a power of two.
  constexpr int K = P == 1 ? 4 : P == 2 ? 8 : 16;
  // Copies, which stores cannot change.
  const int64_t advance = row.g.channels, width = row.g.out_width;
  const int64_t channels = row.channels, dy_step = row.dy_step;
  const int64_t s_tap = kPixel == 1 ? row.s_tap : 1;
  const bool left = column == 0, right = column + P == width;
  const Steps steps(advance), dy_steps(dy_step);
  const T* const dy = row.dy + column * dy_step;
  A ds[3][K] = {};
  for (int64_t ty = row.ty0; ty < row.ty1; ++ty) {
    const T* const pixels = row.x + (ty * width + column) * advance;
    const A* const spatial = row.s + 3 * ty * s_tap + column * kPixel;
    const A* c = row.c + 3 * ty * L;
    A* dc = row.dc + 3 * ty * L;
    V sums[K] = {};
    const auto add = [&](int64_t i, auto wide) __attribute__((always_inline)) {
      const int64_t room = decltype(wide)::value ? L : channels - i;
      V y[P], tap[3], totals[3];
      const T *from = pixels + i, *grad = dy + i;
      DDF_OPAQUE(from);
      DDF_OPAQUE(grad);
      DDF_UNROLL
      for (int p = 0; p < P; ++p) {
        y[p] = load_first<L>(dy_steps(grad, p), room);
        DDF_OPAQUE_VECTOR(y[p]);
      }
      DDF_UNROLL
      for (int x = 0; x < 3; ++x) {
        tap[x] = load<L>(c + x * L);
        totals[x] = load<L>(dc + x * L);
      }
      DDF_UNROLL
      for (int q = 0; q < P + 2; ++q) {
        if (kIsEdge && (q == 0 ? left : q == P + 1 && right)) continue;
        V value = load_first<L>(steps(from, q), room);
        DDF_OPAQUE_VECTOR(value);
        DDF_UNROLL
        for (int x = 0; x < 3; ++x)
          if (const int p = q - x; p >= 0 && p < P) {
            const V product = y[p] * value;
            const V weight = splat<A, L>(spatial[x * s_tap + p * kPixel]);
            sums[x * P + p] += Combine::grad_spatial(product, tap[x], weight);
            totals[x] += Combine::grad_channel(product, tap[x], weight);
          }
      }
      DDF_UNROLL
      for (int x = 0; x < 3; ++x) store<L>(dc + x * L, totals[x]);
      c += 9 * L;
      dc += 9 * L;
    };
    int64_t i = 0;
    for (; i + L <= channels; i += L) add(i, std::true_type());
    if (i < channels) add(i, std::false_type());
    sum_lanes_of_each<A, L>(sums, ds[ty]);
    for (int x = 0; kPixel == 1 && x < 3; ++x)
      std::copy_n(ds[ty] + x * P, P, row.ds + (3 * ty + x) * width + column);
  }
  A* const to = row.ds + column * kPixel;
  if constexpr (kPixel == kTapsInner && P == kStrip && L == K) {
    constexpr auto kLanesOf = std::make_integer_sequence<int, L>();
    const V rows[] = {load<L>(ds[0]), load<L>(ds[1]), load<L>(ds[2])};
    store<L>(to, to_adjacent_taps<0>(rows, kLanesOf));
    store<L>(to + L, to_adjacent_taps<L>(rows, kLanesOf));
    const V rest = to_adjacent_taps<2 * L>(rows, kLanesOf);
    std::memcpy(to + 2 * L, &rest, (9 * P - 2 * L) * sizeof(A));
  } else if constexpr (kPixel == kTapsInner) {
    for (int p = 0; p < P; ++p)
      for (int t = 0; t < 9; ++t) to[p * kPixel + t] = ds[t / 3][t % 3 * P + p];
  }
}

// Whether grad_filters_row_3x3 supports a geometry.
inline bool has_grad_filters_row_3x3(const Geometry& g) {
  return kHas32Registers && g.kernel == 3 && g.dilation == 1 && g.stride == 1 && !g.is_valid;
}

template <int kPixel, class T, class Combine>
__attribute__((noinline)) void grad_filters_row_3x3(const GradRow<T>& row) {
  const int64_t width = row.g.out_width;
  const std::integral_constant<int, kStrip> whole;
  const auto strip = [&](int64_t column, auto pixels, auto is_edge) __attribute__((always_inline)) {
    row.prefetch_next(column);
    grad_filters_strip_3x3<decltype(pixels)::value, decltype(is_edge)::value, kPixel, T, Combine>(
        row, column);
  };
  int64_t column = 0;
  for (; column + kStrip <= width; column += kStrip)
    if (column == 0 || column + kStrip == width)
      strip(column, whole, std::true_type());
    else
      strip(column, whole, std::false_type());
  switch (width - column) {
    case 3:
      return strip(column, std::integral_constant<int, 3>(), std::true_type());
    case 2:
      return strip(column, std::integral_constant<int, 2>(), std::true_type());
    case 1:
      return strip(column, std::integral_constant<int, 1>(), std::true_type());
    default:
      return;
  }
}

// For each column of taps, the pixels [first, last) of a row for which it lies inside the image.
inline std::vector<int64_t> inside_pixels(const Geometry& g) {
  std::vector<int64_t> range;
  for (int64_t tx = 0; tx < g.kernel; ++tx) {
    const int64_t before = std::max<int64_t>(0, g.padding() - tx * g.dilation);
    const int64_t inside = std::max<int64_t>(0, g.width + g.padding() - tx * g.dilation);
    range.push_back(std::min(g.out_width, ceil_div(before, g.stride)));
    range.push_back(std::clamp(ceil_div(inside, g.stride), range.back(), g.out_width));
  }
  return range;
}

// Both filter gradients of a row of the output. `at` has no rows of taps yet, and x is its image's
// first channel. taps_inner: the taps of a pixel of s and ds are adjacent.
template <class T, class Combine>
void grad_filters_of_row(GradRow<T> at, int64_t row, bool taps_inner) {
  const Geometry& g = at.g;
  // Taps outside the image have no gradient.
  const int64_t above = row * g.stride - g.padding();
  at.ty0 = 0;
  at.ty1 = g.kernel;
  while (at.ty0 < at.ty1 && above + at.ty0 * g.dilation < 0) ++at.ty0;
  while (at.ty0 < at.ty1 && above + (at.ty1 - 1) * g.dilation >= g.height) --at.ty1;
  at.x += (above * g.width - g.padding()) * g.channels;
  const auto add = [&](auto pixel) {
    constexpr int kPixel = decltype(pixel)::value;
    if (has_grad_filters_row_3x3(g))
      grad_filters_row_3x3<kPixel, T, Combine>(at);
    else
      grad_filters_row<kPixel, T, Combine>(at);
  };
  if (taps_inner)
    add(std::integral_constant<int, kTapsInner>());
  else
    add(std::integral_constant<int, 1>());
}

template <class T, class Combine>
void grad_filters_channels_last(const Backward& b, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Geometry g = by_subpixel(b.geometry);
  const bool is_fetched = !fits_in_caches<T>(b.geometry);
  const Plan plan(g, g.taps() * g.out_width * static_cast<int64_t>(sizeof(A)),
                  is_fetched ? shared_row_bytes<T>(g) : 0);
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* features = static_cast<const T*>(b.features);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  const int64_t taps = g.taps(), width = g.out_width, row_taps = taps * width;
  const ChannelPartials<T> channel_partials(b, g, plan);
  // A channels_last 3x3 spatial filter of one group is read, and its gradient written, without a
  // copy.
  const auto is_dense = [taps](const SpatialStrides& strides) {
    return strides.tap == 1 && strides.column == taps;
  };
  const bool is_in_place = std::is_same_v<T, A> && taps == kTapsInner && spatial_filter &&
                           is_dense(b.spatial_strides) &&
                           (!b.grad_spatial || is_dense(b.grad_spatial_strides));
  SpatialPartials<T> spatial_partials(b, g, plan, is_in_place);
  const std::vector<int64_t> range = inside_pixels(g);

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const int64_t room = round_up(plan.block_channels, L);
    Scratch<A> channel(room * taps), dc(room * taps), s(row_taps), ds(row_taps);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      const int64_t count = item.channel1 - item.channel0;
      const int64_t image = item.image / g.subpixels(), r = item.image % g.subpixels();
      const T* pixels = features + image * g.height * g.width * g.channels + item.channel0;
      const SpatialStrides& from = b.spatial_strides;
      const T* filter = filter_of_group(spatial_filter, from, g, item.image, item.group);
      std::fill(dc.get(), dc + room * taps, A(0));
      fill_channel_blocks(channel.get(), taps, g, channel_filter, item.image, item.channel0,
                          item.channel1, false, A(Combine::kNeutral));
      for (int64_t row = item.row0; row < item.row1; ++row) {
        const int64_t out_row = (image * g.out_height + row) * g.scale + r / g.scale;
        const T* dy = grad + (out_row * width * g.scale + r % g.scale) * g.channels + item.channel0;
        A* const partial = spatial_partials.at(item.channel_block, item.image, item.group, row);
        A* const sums = partial ? partial : ds.get();
        std::fill_n(sums, row_taps, A(0));
        GradRow<T> at{g,    range.data(), pixels, dy,   g.scale * g.channels, s, width,
                      sums, channel,      dc,     count};
        // Costs 5 % where the tensors fit in the caches.
        if (is_fetched && row + 1 < g.out_height) {
          const int64_t below = (row + 1) * g.stride - g.padding();
          int64_t first = g.kernel - std::min(g.kernel, ceil_div(g.stride, g.dilation));
          while (first < g.kernel && below + first * g.dilation < 0) ++first;
          int64_t last = g.kernel;
          while (first < last && below + (last - 1) * g.dilation >= g.height) --last;
          at.next_x = pixels + (below + first * g.dilation) * g.width * g.channels;
          at.next_rows = last - first;
          at.next_dy = dy + g.scale * g.scale * width * g.channels;
          if (filter && from.tap == 1)
            prefetch_rows(filter + (row + 1) * from.row, from.column, width, taps);
        }
        if constexpr (std::is_same_v<T, A>)
          if (is_in_place) {
            at.s = filter + row * from.row;
            at.s_tap = 1;
          }
        for (int64_t t = 0; t < taps && !is_in_place; ++t)
          if (filter)
            load_row(s + t * width, filter + t * from.tap + row * from.row, width, from.column);
          else
            std::fill(s + t * width, s + (t + 1) * width, A(Combine::kNeutral));
        grad_filters_of_row<T, Combine>(at, row, is_in_place);
        if (!partial) spatial_partials.write_row(item.image, item.group, row, sums, width);
      }
      channel_partials.add_blocks(item.image, item.tile, item.channel0, count, dc);
    }
  });
  channel_partials.write(run);
  spatial_partials.write(run);
}

// Sums of kCount adjacent lanes, in the first of them; lanes after the last are zero.
template <int kCount, class V, int... I>
DDF_INLINE V sum_adjacent(V v, std::integer_sequence<int, I...> lanes) {
  if constexpr (kCount == 1) {
    return v;
  } else {
    constexpr int kHalf = kCount / 2;
    const V half = sum_adjacent<kHalf>(v, lanes);
    const V pair = half + DDF_SHUFFLE(half, V{}, (I + kHalf)...);
    if constexpr (kCount % 2 == 0) return pair;
    return pair + DDF_SHUFFLE(v, V{}, std::min(I + kCount - 1, int{sizeof...(I)})...);
  }
}

// Every kStep-th lane, in the first ones.
template <int kStep, class V, int... I>
DDF_INLINE V lanes_apart(V v, std::integer_sequence<int, I...>) {
  return DDF_SHUFFLE(v, v, (I * kStep % static_cast<int>(sizeof...(I)))...);
}

// With p = dy * x at the taps of a strip of P pixels, for a vector of whole groups of kChannels
// channels: ds[(tap * kStrip + pixel) * pitch + group] = sum over the channels of the group of p *
// c[tap], and dc[tap] += p * s (p alone for Add). Stores L values from the vector's first group on.
template <int P, int kChannels, class T, class Combine>
DDF_INLINE void grad_filters_of_groups(const Taps<T>& taps, int64_t first, const T* filter,
                                       int64_t group_step, int64_t pixel_step,
                                       const LaneGroups<Accumulate<T>>& groups, const T* dy,
                                       int64_t dy_step, const Accumulate<T>* c, Accumulate<T>* dc,
                                       Accumulate<T>* ds, int64_t pitch, int64_t room) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>, N = L / kChannels;
  using V = Vector<A, L>;
  constexpr auto kLanesOf = std::make_integer_sequence<int, L>();
  room = std::min<int64_t>(room, N * kChannels);
  const int64_t from_first = first + taps.pixel_shift;
  filter += taps.filter_shift;
  LaneMask<T, L> from_lane[L];
  DDF_UNROLL
  for (int j = 1; j < N; ++j) from_lane[j] = lanes_from<T, L>(groups.start[j]);
  V y[P];
  DDF_UNROLL
  for (int p = 0; p < P; ++p) y[p] = load_first<L>(dy + p * dy_step, room);
  for (int64_t u = 0; u < taps.count; ++u) {
    const int64_t t = taps.tap[u];
    const T *from = taps.pixel[u] + from_first, *values = filter + taps.filter[u];
    const V tap = load<L>(c + t * L);
    V total = load<L>(dc + t * L);
    DDF_UNROLL
    for (int p = 0; p < P; ++p) {
      const V spatial = load_of_groups<L, N>(values, group_step, from_lane, groups.count);
      const V product = y[p] * load_up_to<L>(from, room);
      values += pixel_step;
      from += taps.advance;
      total += Combine::grad_channel(product, tap, spatial);
      const V sums =
          sum_adjacent<kChannels>(Combine::grad_spatial(product, tap, spatial), kLanesOf);
      store<L>(ds + (t * kStrip + p) * pitch + first / kChannels,
               lanes_apart<kChannels>(sums, kLanesOf));
    }
    store<L>(dc + t * L, total);
  }
}

// Whether grad_filters_few_channels can do this: it has at least one full vector, and the taps of a
// pixel are adjacent.
template <class A>
bool can_bundle_groups(const Backward& b) {
  const Geometry& g = b.geometry;
  return 2 * g.group_channels <= kLanes<A> && g.groups >= kLanes<A> / g.group_channels &&
         (b.spatial_filter == nullptr || b.spatial_strides.tap == 1) &&
         (b.grad_spatial == nullptr || b.grad_spatial_strides.tap == 1);
}

// Calls body with the number of channels of a group as a constant, at most L / 2.
template <int L, class F>
void with_group_channels(int64_t channels, const F& body) {
  switch (channels) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, std::min(2, L / 2)>());
    case 3:
      return body(std::integral_constant<int, std::min(3, L / 2)>());
    case 4:
      return body(std::integral_constant<int, std::min(4, L / 2)>());
    case 5:
      return body(std::integral_constant<int, std::min(5, L / 2)>());
    case 6:
      return body(std::integral_constant<int, std::min(6, L / 2)>());
    case 7:
      return body(std::integral_constant<int, std::min(7, L / 2)>());
    default:
      return body(std::integral_constant<int, std::min(8, L / 2)>());
  }
}

// grad_filters_channels_last for groups of few channels.
template <class T, class Combine>
void grad_filters_few_channels(const Backward& b, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const Geometry g = by_subpixel(b.geometry);
  const int64_t taps = g.taps(), width = g.out_width;
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* features = static_cast<const T*>(b.features);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  auto* grad_spatial = static_cast<T*>(b.grad_spatial);
  // An item has the channels of all groups.
  Geometry all = g;
  all.groups = 1;
  const Plan plan(all,
                  2 * width * (g.channels + g.groups * taps) * static_cast<int64_t>(sizeof(T)));
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  const Gather gather(g, true);
  const auto strips = gather.columns.strips();
  const T neutral = narrow<T>(A(Combine::kNeutral));
  const SpatialStrides from = spatial_filter ? b.spatial_strides : SpatialStrides{};
  const SpatialStrides& to = b.grad_spatial_strides;
  // Channels of a vector.
  const int64_t number = L / g.group_channels * g.group_channels;
  std::vector<LaneGroups<A>> vectors;
  for (int64_t c = 0; c < g.channels; c += number)
    vectors.push_back(LaneGroups<A>(g, c, static_cast<int>(L / g.group_channels)));
  const ChannelPartials<T> channel_partials(b, g, plan);
  const int64_t pitch = g.groups + L, pixel_step = g.scale * g.channels;

  const auto add_rows = [&](int64_t begin, int64_t end, auto group_channels) {
    Taps<T> of_strip(taps);
    const int64_t block = taps * L, blocks = static_cast<int64_t>(vectors.size()) * block;
    Scratch<A> channel(blocks), dc(blocks), ds(taps * kStrip * pitch);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(all, index);
      const int64_t image = item.image / g.subpixels(), r = item.image % g.subpixels();
      const T* pixels = features + image * g.height * g.width * g.channels;
      const T* filter =
          spatial_filter ? filter_of_group(spatial_filter, from, g, item.image, 0) : &neutral;
      for (int64_t c = 0; c < g.channels; c += number)
        fill_channel_blocks(channel + c / number * block, taps, g, channel_filter, item.image, c,
                            std::min(c + number, g.channels), false, A(Combine::kNeutral));
      std::fill(dc.get(), dc + blocks, A(0));
      for (int64_t row = item.row0; row < item.row1; ++row) {
        const int64_t out_row = (image * g.out_height + row) * g.scale + r / g.scale;
        const T* dy = grad + (out_row * width * g.scale + r % g.scale) * g.channels;
        for (const auto& strip : strips) {
          gather.locate(of_strip, pixels, from, row, strip);
          gather.prefetch_pixels(pixels, row, strip);
          prefetch_rows<3>(dy + (strip.first + strip.count) * pixel_step, pixel_step, strip.count,
                           g.channels);
          if (spatial_filter) gather.prefetch_filters(filter, from, row, strip);
          // Taps outside the image have no gradient.
          if (of_strip.count < taps) std::fill(ds.get(), ds + taps * kStrip * pitch, A(0));
          const auto add = [&](auto count) __attribute__((always_inline)) {
            constexpr int P = decltype(count)::value;
            for (int64_t c = 0; c < g.channels; c += number) {
              const LaneGroups<A>& groups = vectors[c / number];
              grad_filters_of_groups<P, decltype(group_channels)::value, T, Combine>(
                  of_strip, c, filter + groups.first * taps * from.tap, taps * from.tap,
                  from.column, groups, dy + strip.first * pixel_step + c, pixel_step,
                  channel + c / number * block, dc + c / number * block, ds, pitch, g.channels - c);
            }
          };
          if (strip.count == kStrip)
            add(std::integral_constant<int, kStrip>());
          else
            add(std::integral_constant<int, 1>());
          for (int64_t p = 0; grad_spatial && p < strip.count; ++p)
            transpose(grad_spatial + to.start(item.image, g.subpixels()) + row * to.row +
                          (strip.first + p) * to.column,
                      taps, ds + p * pitch, kStrip * pitch, taps, g.groups);
        }
      }
      A* channel_to = channel_partials.at(item.image, item.tile, 0);
      for (int64_t c = 0; c < g.channels; ++c, channel_to += taps)
        for (int64_t t = 0; t < taps; ++t)
          channel_to[t] = dc[c / number * block + t * L + c % number];
    }
  };
  with_group_channels<L>(g.group_channels, [&](auto group_channels) {
    parallel(run, plan.items,
             [&](int64_t begin, int64_t end) { add_rows(begin, end, group_channels); });
  });
  channel_partials.write(run);
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
