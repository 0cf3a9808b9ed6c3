// Kernels whose vectors run along a row: for contiguous (NCHW) features, and for channels_last
// (NHWC) ones with few channels, which are separated when rows are loaded.
// Rows of features are copied into a zero-padded tile, split into the phases of the stride, where
// each tap reads consecutive values for any kernel, stride and dilation. The spatial filter of a
// tile of rows is converted to the accumulation type once for all channels of its group.
#pragma once
#include "cpu/filter_norm.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// Channels of a block, which are filtered together.
constexpr int kBlockChannels = 4;

// Steps in the features, in elements.
struct ImageStrides {
  int64_t channel, row, pixel;

  ImageStrides(bool channels_last, int64_t channels, int64_t height, int64_t width)
      : channel(channels_last ? 1 : height * width),
        row(channels_last ? width * channels : width),
        pixel(channels_last ? channels : 1) {}
};

// `count` pixels of a row, `step` apart, of `channels` channels, widened: channel n to to + n *
// line.
template <class T>
DDF_INLINE void load_channels(Accumulate<T>* to, int64_t line, const T* from,
                              const ImageStrides& strides, int channels, int64_t count,
                              int64_t step) {
  if (strides.channel == 1 && channels > 1)
    return transpose(to, line, from, step * strides.pixel, count, channels);
  for (int n = 0; n < channels; ++n)
    load_row(to + n * line, from + n * strides.channel, count, step * strides.pixel);
}

// The zero-padded copy of the rows that a tile of output rows reads, of kBlockChannels channels
// with interleaved rows: channel n starts n * line after channel 0.
//
// Padded row r and column c lie in phase (r % stride, c % stride) at (r / stride, c / stride); tap
// (ty, tx) of output (i, j) is padded row i * stride + ty * dilation, so it lies
// offset_of(ty * dilation, tx * dilation) after i * pitch + j. Phases that no tap reads are left
// out.
template <class A>
struct PaddedTile {
  // The values of one phase in a row of the features.
  struct Run {
    int64_t offset;  // in the padded tile, from the row's
    int64_t column;  // the first; the next ones are stride apart
    int64_t count;
  };

  const Geometry& g;
  int64_t rows, columns;  // padded
  int64_t phases;         // of rows, and of columns
  int64_t phase_rows, line, pitch, size;
  std::vector<int64_t> row_offset;  // of each padded row
  std::vector<Run> runs;

  PaddedTile(const Geometry& geometry, int64_t out_rows) : g(geometry) {
    const int64_t extent = (g.kernel - 1) * g.dilation, pad = g.padding();
    rows = (out_rows - 1) * g.stride + extent + 1;
    columns = (g.out_width - 1) * g.stride + extent + 1;
    phases = std::min(g.stride, extent + 1);
    phase_rows = ceil_div(rows, g.stride);
    // A vector that starts in the row may end after it.
    line =
        std::max(ceil_div(columns, g.stride), round_up(g.out_width, kLanes<A>) + extent / g.stride);
    // With stride 1, rows of the features are aligned to vectors.
    line = round_up(line, kLanes<A>);
    pitch = kBlockChannels * line;
    const int64_t lead = g.stride == 1 ? round_up(pad, kLanes<A>) - pad : 0;
    size = lead + phases * phases * phase_rows * pitch;
    for (int64_t r = 0; r < rows; ++r)
      row_offset.push_back(lead + r % g.stride * phases * phase_rows * pitch +
                           r / g.stride * pitch);
    const int64_t end = std::min(columns, g.width + pad);
    for (int64_t c = pad; c < std::min(pad + g.stride, end); ++c)
      if (c % g.stride < phases)
        runs.push_back({column_offset(c), c - pad, ceil_div(end - c, g.stride)});
  }

  int64_t column_offset(int64_t column) const {
    return column % g.stride * phase_rows * pitch + column / g.stride;
  }
  int64_t offset_of(int64_t row, int64_t column) const {
    return row_offset[row] + column_offset(column);
  }
  std::vector<int64_t> offsets_of_taps() const {
    std::vector<int64_t> offsets;
    for (int64_t t = 0; t < g.taps(); ++t)
      offsets.push_back(offset_of(t / g.kernel * g.dilation, t % g.kernel * g.dilation));
    return offsets;
  }

  // Copies the rows of NC channels that the tile at output row row0 reads. Prefetches those of the
  // channels `ahead` elements later, unless that is 0.
  template <int NC, class T>
  void fill(A* to, const T* from, const ImageStrides& strides, int64_t row0, int64_t ahead) const {
    const int64_t above = row0 * g.stride - g.padding();
    const int64_t begin = std::max<int64_t>(0, -above), end = std::min(rows, g.height - above);
    if (begin >= end) return;
    for (int n = 0; n < NC && ahead; ++n)
      prefetch_rows(from + n * strides.channel + ahead + (above + begin) * strides.row, strides.row,
                    end - begin, g.width);
    if (g.stride == 1 && strides.pixel == 1) {
      for (int n = 0; n < NC; ++n)
        load_rows(to + n * line + row_offset[begin] + runs[0].offset, pitch,
                  from + n * strides.channel + (above + begin) * strides.row, strides.row,
                  end - begin, runs[0].count);
      return;
    }
    for (int64_t r = begin; r < end; ++r)
      for (const Run& run : runs)
        if (r % g.stride < phases)
          load_channels(to + row_offset[r] + run.offset, line,
                        from + (above + r) * strides.row + run.column * strides.pixel, strides, NC,
                        run.count, g.stride);
  }
};

// Pixels that use the same taps: `step` apart, starting at (row, column).
struct Phase {
  struct Tap {
    int64_t channel, spatial;  // offsets in the filters of a channel and of a pixel
    int64_t down, right;       // from pixel (i, j) to the one whose spatial filter it is
  };
  int64_t row, column;
  std::vector<Tap> taps;
  std::vector<int64_t> x_offset;  // in the padded tile, of each tap
};

// Prefetches what a tap of a tile of rows reads in a spatial filter of rows x columns pixels.
// Inlined, because GCC removes calls of functions that only prefetch.
template <class T>
DDF_INLINE void prefetch_plane(const Phase::Tap& tap, int64_t row0, int64_t row1, const T* filter,
                               int64_t rows, int64_t columns, const SpatialStrides& strides) {
  const int64_t begin = std::max<int64_t>(row0 + tap.down, 0);
  prefetch_rows(filter + tap.spatial + begin * strides.row, strides.row,
                std::min(row1 + tap.down, rows) - begin, columns);
}

// A tile of a phase's spatial filter in the order in which filter_rows reads it,
// to[(i * blocks + b) * taps + t][lane] for vector b of row i of `width` pixels. Outside the
// filter, which has rows x columns pixels, the tile is neutral.
template <class T>
void load_spatial_tile(Accumulate<T>* to, const std::vector<Phase::Tap>& taps, int64_t width,
                       int64_t row0, int64_t row1, const T* filter, int64_t rows, int64_t columns,
                       const SpatialStrides& strides, Accumulate<T> neutral) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(width, L), count = static_cast<int64_t>(taps.size());
  // In a channels_last filter, the taps of a pixel for itself are adjacent.
  bool is_own = filter && count > 0 && strides.tap == 1 && strides.column != 1;
  for (int64_t t = 0; t < count && is_own; ++t)
    is_own = taps[t].down == 0 && taps[t].right == 0 && taps[t].spatial == taps[0].spatial + t;
  if (is_own) {
    // Processors do not foresee taps of several cache lines in pixels so far apart, which matters
    // if they are in no cache.
    constexpr int64_t kSize = sizeof(T);
    const bool is_far = count * kSize > 64 && strides.column * kSize >= 256 &&
                        rows * strides.row * kSize > kCacheBytes;
    for (int64_t row = row0; row < row1; ++row)
      for (int64_t b = 0; b < blocks; ++b, to += count * L) {
        const int64_t lanes =
            row < rows ? std::clamp<int64_t>(std::min(width, columns) - b * L, 0, L) : 0;
        if (lanes < L) std::fill(to, to + count * L, neutral);
        const T* const own = filter + taps[0].spatial + row * strides.row + b * L * strides.column;
        if (lanes > 0) {
          if (is_far) prefetch_rows(own + L * strides.column, strides.column, L, count);
          transpose(to, L, own, strides.column, lanes, count);
        }
      }
    return;
  }
  // The filter of a row of pixels, between neutral ones that the taps reach. Taps of a pixel that
  // are adjacent in memory are transposed together.
  const auto last_of_run = [&](int64_t first) {
    int64_t last = first + 1;
    while (last < count && strides.column != 1 && taps[last].down == taps[first].down &&
           taps[last].spatial == taps[first].spatial + last - first)
      ++last;
    return last;
  };
  int64_t left = 0, right = 0, longest = 0;
  for (int64_t first = 0; first < count; first = last_of_run(first))
    longest = std::max(longest, last_of_run(first) - first);
  for (const Phase::Tap& tap : taps) {
    left = std::max(left, -tap.right);
    right = std::max(right, tap.right);
  }
  const int64_t pitch = left + std::max(columns, right + blocks * L);
  Scratch<A> lines(longest * pitch);
  std::fill(lines.get(), lines + longest * pitch, neutral);
  // The vectors of many taps are stored far apart, which is faster from a copy of the row: 49 taps
  // were faster without, 441 with it.
  const bool is_direct = strides.column == 1 && count < 128;
  // Where an image's filters are in no cache. In a plane, a tile is too short to be foreseen.
  const bool is_fetched = filter && is_direct && strides.batch * int64_t{sizeof(T)} > kCacheBytes;
  for (int64_t first = 0, last = 0; first < count; first = last) {
    last = last_of_run(first);
    if (is_fetched && first + 2 < count)
      prefetch_plane(taps[first + 2], row0, row1, filter, rows, columns, strides);
    for (int64_t row = row0; row < row1; ++row) {
      const int64_t from = row + taps[first].down;
      const bool is_inside = filter && from >= 0 && from < rows;
      const T* values = is_inside ? filter + taps[first].spatial + from * strides.row : nullptr;
      if (is_inside && is_direct && taps[first].right == 0) {
        A* block = to + ((row - row0) * blocks * count + first) * L;
        const int64_t whole = std::min(columns / L, blocks);
        for (int64_t b = 0; b < whole; ++b, block += count * L)
          store<L>(block, load<L>(values + b * L));
        for (int64_t b = whole; b < blocks; ++b, block += count * L) {
          const int64_t lanes = std::max<int64_t>(columns - b * L, 0);
          store<L>(block, first_lanes<A, L>(lanes) ? load_some<L>(values + b * L, lanes)
                                                   : splat<A, L>(neutral));
        }
        continue;
      }
      if (is_inside && last - first > 1)
        transpose(lines + left, pitch, values, strides.column, columns, last - first);
      else if (is_inside)
        load_row(lines + left, values, columns, strides.column);
      for (int64_t t = first; t < last; ++t)
        for (int64_t b = 0; b < blocks; ++b) {
          const A* line = lines + (t - first) * pitch + left + taps[t].right + b * L;
          store<L>(to + (((row - row0) * blocks + b) * count + t) * L,
                   is_inside ? load<L>(line) : splat<A, L>(neutral));
        }
    }
  }
}

// FilterNorm or softmax of the result of load_spatial_tile.
template <class A>
void normalize_spatial_tile(A* spatial_tile, int64_t taps, int64_t blocks,
                            const TypedPackOptions<A>& pack) {
  constexpr int L = kLanes<A>;
  for (int64_t b = 0; pack.normalize && b < blocks; ++b)
    standardize<A, L>(spatial_tile + b * taps * L, taps, L, pack.eps, pack.spatial_scale);
  for (int64_t b = 0; pack.softmax && b < blocks; ++b)
    softmax<A, L>(spatial_tile + b * taps * L, taps);
}

// Stores a vector of R rows and NC channels, at least output_min, with room for `room` values from
// `out` on.
template <int R, int NC, class T, class V>
DDF_INLINE void store_sums(const V (&sums)[R * NC], Accumulate<T> output_min, T* out, int64_t width,
                           int64_t out_size, int64_t room) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const auto store = [&](auto is_whole) __attribute__((always_inline)) {
    DDF_UNROLL
    for (int r = 0; r < R; ++r) DDF_UNROLL
    for (int n = 0; n < NC; ++n)
      store_first<L>(out + n * out_size + r * width,
                     clamp_min(sums[r * NC + n], splat<A, L>(output_min)),
                     decltype(is_whole)::value ? L : room - r * width);
  };
  // One branch for all vectors: with one each, compilers delay the sums and spill registers.
  if (room - (R - 1) * width >= L)
    store(std::true_type());
  else
    store(std::false_type());
}

// out[n][r, j] = sum_t x[x_offset[t] + (r * kBlockChannels + n) * line + j] * (c[t, n] o
// s[r][t][j]) for one vector of R rows and NC channels, with the bias c[taps, n], the lower bound
// c[taps + 1, 0], and room for `room` values from out on.
template <class T, class Combine, int R, int NC>
DDF_INLINE void filter_vectors(int64_t taps, const int64_t* x_offset, const Accumulate<T>* x,
                               int64_t line, const Accumulate<T>* s, int64_t s_row,
                               const Accumulate<T>* c, T* out, int64_t width, int64_t out_size,
                               int64_t room) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  V sums[R * NC];
  // x86 addresses scale an index by 1, 2, 4 or 8 only.
  int64_t line3 = 3 * line;
  DDF_OPAQUE(line3);
  DDF_UNROLL
  for (int i = 0; i < R * NC; ++i) sums[i] = splat<A, L>(c[taps * kBlockChannels + i % NC]);
  for (int64_t t = 0; t < taps; ++t) {
    const A *from = x + x_offset[t], *below = from + kBlockChannels * line;
    DDF_OPAQUE(below);
    const V spatial = load<L>(s + t * L), spatial2 = load<L>(s + (R - 1) * s_row + t * L);
    DDF_UNROLL
    for (int n = 0; n < NC; ++n) {
      const V channel = splat<A, L>(c[t * kBlockChannels + n]);
      sums[n] += load<L>(from + (n == 3 ? line3 : n * line)) * Combine::weight(channel, spatial);
      if constexpr (R == 2)
        sums[NC + n] +=
            load<L>(below + (n == 3 ? line3 : n * line)) * Combine::weight(channel, spatial2);
    }
  }
  store_sums<R, NC>(sums, c[(taps + 1) * kBlockChannels], out, width, out_size, room);
}

// filter_vectors for 3x3 windows, whose taps are adjacent: x is where the first one reads, s its
// values, s_tap the step to the next tap. The spatial filter stays in registers for all channels,
// and the rows of two windows share the pixels.
template <class T, class Combine, int R, int NC>
DDF_INLINE void filter_vectors_3x3(const Accumulate<T>* x, int64_t line, const Accumulate<T>* s,
                                   int64_t s_tap, int64_t s_row, const Accumulate<T>* c, T* out,
                                   int64_t width, int64_t out_size, int64_t room) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  V spatial[R * 9], sums[R * NC];
  DDF_UNROLL
  for (int r = 0; r < R; ++r) DDF_UNROLL
  for (int t = 0; t < 9; ++t) {
    spatial[r * 9 + t] = load<L>(s + r * s_row + t * s_tap);
    DDF_OPAQUE_VECTOR(spatial[r * 9 + t]);
  }
  DDF_UNROLL
  for (int n = 0; n < NC; ++n) {
    const A* from = x + n * line;
    DDF_UNROLL
    for (int r = 0; r < R; ++r) sums[r * NC + n] = splat<A, L>(c[9 * kBlockChannels + n]);
    DDF_UNROLL
    for (int row = 0; row < R + 2; ++row, from += kBlockChannels * line) {
      DDF_OPAQUE(from);
      DDF_UNROLL
      for (int column = 0; column < 3; ++column) {
        V value = load<L>(from + column);
        DDF_OPAQUE_VECTOR(value);
        DDF_UNROLL
        for (int r = 0; r < R; ++r)
          if (const int t = (row - r) * 3 + column; row >= r && row < r + 3)
            sums[r * NC + n] +=
                value * Combine::weight(splat<A, L>(c[t * kBlockChannels + n]), spatial[r * 9 + t]);
      }
    }
  }
  store_sums<R, NC>(sums, c[10 * kBlockChannels], out, width, out_size, room);
}

// Filters rows of NC channels. A vector that exceeds its row is overwritten by the next row, so
// pairs of rows start with their last vector; the last vectors of the tile are stored in part.
template <class T, class Combine, int NC, int kWindow>
__attribute__((noinline)) void filter_rows(int64_t taps, int64_t rows, int64_t width,
                                           const int64_t* x_offset, int64_t line,
                                           const Accumulate<T>* x, const Accumulate<T>* s,
                                           const Accumulate<T>* c, T* out, int64_t out_size) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t blocks = ceil_div(width, L), s_row = blocks * taps * L;
  const auto filter = [&](int64_t i, auto count) __attribute__((always_inline)) {
    constexpr int R = decltype(count)::value;
    for (int64_t k = 0, b = blocks - 1; k < blocks; b = k++) {
      const A *from = x + i * kBlockChannels * line + b * L,
              *spatial = s + i * s_row + b * taps * L;
      T* const to = out + i * width + b * L;
      const int64_t room = (rows - i) * width - b * L;
      if constexpr (kWindow == 0)
        filter_vectors<T, Combine, R, NC>(taps, x_offset, from, line, spatial, s_row, c, to, width,
                                          out_size, room);
      else
        filter_vectors_3x3<T, Combine, R, NC>(from + x_offset[kWindow > 0 ? 0 : 8], line,
                                              kWindow > 0 ? spatial : spatial + 8 * L, kWindow * L,
                                              s_row, c, to, width, out_size, room);
    }
  };
  int64_t i = 0;
  for (; i + 2 <= rows; i += 2) filter(i, std::integral_constant<int, 2>());
  if (i < rows) filter(i, std::integral_constant<int, 1>());
}

// 1 if the taps read 3x3 windows in order, -1 if they read them in reverse order, otherwise 0.
// Rows of a window are `pitch` apart.
inline int window_of(const std::vector<int64_t>& x_offset, int64_t pitch) {
  if (x_offset.size() != 9) return 0;
  const int direction = x_offset[8] > x_offset[0] ? 1 : -1;
  for (int64_t t = 0; t < 9; ++t)
    if (x_offset[t] != x_offset[0] + direction * (t / 3 * pitch + t % 3)) return 0;
  return direction;
}

// Calls body with the number of channels as a constant: kBlockChannels at a time, then the others.
template <class F>
void for_each_channel_block(int64_t begin, int64_t end, const F& body) {
  int64_t c = begin;
  for (; c + kBlockChannels <= end; c += kBlockChannels)
    body(c, std::integral_constant<int, kBlockChannels>());
  if (end - c == 3) body(c, std::integral_constant<int, 3>());
  if (end - c == 2) body(c, std::integral_constant<int, 2>());
  if (end - c == 1) body(c, std::integral_constant<int, 1>());
}

// Interleaves the phases of a row, from[(phase, channel)][row], into rows of the output.
template <int NC, class T>
void interleave_rows(const T* from, int64_t from_size, int64_t rows, int64_t width,
                     int64_t phase_row, int64_t step, int64_t row0, T* to, int64_t to_height,
                     int64_t to_width) {
  for (int n = 0; n < NC; ++n)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = (row0 + i) * step + phase_row;
      if (row >= to_height) break;
      T* line = to + (n * to_height + row) * to_width;
      const T* values = from + n * from_size + i * width;
      const int64_t whole = to_width / step;
      if (step == 2) {
        store_interleaved(line, values, values + NC * from_size, to_width);
      } else {
        transpose(line, step, values, NC * from_size, step, whole);
        for (int64_t j = whole * step; j < to_width; ++j)
          line[j] = values[j % step * NC * from_size + whole];
      }
    }
}

// Stores the pixels of a phase, from[channel][row], into rows of a channels_last output.
template <int NC, class T>
void store_pixels(const T* from, int64_t from_size, int64_t rows, int64_t width, const Phase& phase,
                  int64_t step, int64_t row0, T* to, int64_t to_height, int64_t to_width,
                  const ImageStrides& strides) {
  const int64_t count = ceil_div(to_width - phase.column, step);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = (row0 + i) * step + phase.row;
    if (row >= to_height) break;
    transpose(to + row * strides.row + phase.column * strides.pixel, step * strides.pixel,
              from + i * width, from_size, NC, count);
  }
}

// Forward and grad_features: filters `from`, padded as g says, for the pixels of each phase of
// `to`, which has to_height x to_width pixels, `step` apart in a phase. `filters` is the geometry
// of the operator.
template <class T, class Combine>
void filter_nchw(const Geometry& g, const Plan& plan, const PaddedTile<Accumulate<T>>& padded,
                 const std::vector<Phase>& phases, const T* from, const Geometry& filters,
                 const T* channel_filter, const T* spatial_filter, const SpatialStrides& strides,
                 T* to, int64_t to_height, int64_t to_width, int64_t step, bool channels_last,
                 const TypedPackOptions<Accumulate<T>>& pack, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t tile_size = plan.rows * round_up(g.out_width, L), to_size = to_height * to_width;
  const ImageStrides from_strides(channels_last, g.channels, g.height, g.width);
  const ImageStrides to_strides(channels_last, g.channels, to_height, to_width);
  // Rows of one phase in one plane are stored where they belong, others by way of tiles.
  const bool is_dense = step == 1 && !channels_last;
  const int64_t buffers = is_dense ? 0 : channels_last ? 1 : std::min(step, to_width);
  int64_t all_taps = 0, most_taps = 0;
  for (const Phase& phase : phases) {
    all_taps += static_cast<int64_t>(phase.taps.size());
    most_taps = std::max(most_taps, static_cast<int64_t>(phase.taps.size()));
  }
  // Of few channels, the filters of a phase are used once.
  const bool is_kept = plan.block_channels > kBlockChannels;

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    Scratch<A> spatial(tile_size * (is_kept ? all_taps : most_taps)),
        channel((most_taps + 2) * kBlockChannels), x(padded.size);
    Scratch<T> phase_tiles(kBlockChannels * tile_size * buffers);
    int64_t padded_for = 0;
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      const int64_t rows = item.row1 - item.row0;
      // Other rows of the tile lie outside the image.
      if (item.row0 != padded_for) std::fill(x.get(), x + padded.size, A(0));
      padded_for = item.row0;
      const T* filter = spatial_filter ? spatial_filter + item.image * strides.batch +
                                             item.group * filters.taps() * strides.tap
                                       : nullptr;
      for_each_channel_block(item.channel0, item.channel1, [&](int64_t c, auto number) {
        constexpr int NC = decltype(number)::value;
        const int64_t ahead =
            c + 2 * NC <= item.channel1 && !channels_last ? NC * from_strides.channel : 0;
        padded.template fill<NC>(
            x.get(), from + item.image * g.channels * g.height * g.width + c * from_strides.channel,
            from_strides, item.row0, ahead);
        const int64_t taps = filters.taps();
        const T* const channel_taps =
            channel_filter
                ? channel_filter + (item.image * filters.subpixels() * g.channels + c) * taps
                : nullptr;
        A* spatial_tile = spatial;
        for (const Phase& phase : phases) {
          const int64_t count = static_cast<int64_t>(phase.taps.size());
          // When the first channels need it, so that few channels find it in the L1 cache.
          if (c == item.channel0) {
            if (filter && strides.column == 1 && &phase != &phases.back())
              for (const Phase::Tap& tap : (&phase + 1)->taps)
                prefetch_plane(tap, item.row0, item.row1, filter, filters.out_height,
                               filters.out_width, strides);
            load_spatial_tile(spatial_tile, phase.taps, g.out_width, item.row0, item.row1, filter,
                              filters.out_height, filters.out_width, strides, A(Combine::kNeutral));
            normalize_spatial_tile<A>(spatial_tile, count, rows * ceil_div(g.out_width, L), pack);
          }
          // By row and column of the window.
          constexpr bool kHas3x3 = NC == kBlockChannels && kHas32Registers;
          const int window = kHas3x3 ? window_of(phase.x_offset, padded.pitch) : 0;
          for (int64_t t = 0; t < count; ++t)
            for (int n = 0; n < NC; ++n)
              channel[(window < 0 ? count - 1 - t : t) * kBlockChannels + n] =
                  channel_taps ? widen(channel_taps[phase.taps[t].channel + n * taps])
                               : A(Combine::kNeutral);
          pack.template normalize_channels<kBlockChannels>(channel, count, c, NC);
          for (int n = 0; n < NC; ++n) {
            channel[count * kBlockChannels + n] = pack.bias ? pack.bias[c + n] : A(0);
            channel[(count + 1) * kBlockChannels + n] = pack.output_min;
          }
          T* plane = to + item.image * g.channels * to_size + c * to_strides.channel;
          T* phase_tile = phase_tiles.get() + (channels_last ? 0 : phase.column * NC * tile_size);
          const auto filter = [&](auto direction) {
            filter_rows<T, Combine, NC, decltype(direction)::value>(
                count, rows, g.out_width, phase.x_offset.data(), padded.line, x, spatial_tile,
                channel, is_dense ? plane + item.row0 * to_width : phase_tile,
                is_dense ? to_size : tile_size);
          };
          if constexpr (kHas3x3) {
            if (window > 0) filter(std::integral_constant<int, 1>());
            if (window < 0) filter(std::integral_constant<int, -1>());
          }
          if (window == 0) filter(std::integral_constant<int, 0>());
          if (channels_last)
            store_pixels<NC>(phase_tile, tile_size, rows, g.out_width, phase, step, item.row0,
                             plane, to_height, to_width, to_strides);
          else if (!is_dense && phase.column == std::min(step, to_width) - 1)
            interleave_rows<NC>(phase_tiles.get(), tile_size, rows, g.out_width, phase.row, step,
                                item.row0, plane, to_height, to_width);
          if (is_kept) spatial_tile += tile_size * count;
        }
      });
    }
  });
}

// Bytes of a row of a tile of the spatial filter.
template <class T>
int64_t spatial_row_bytes(int64_t width, int64_t taps) {
  return taps * round_up(width, kLanes<Accumulate<T>>) *
         static_cast<int64_t>(sizeof(Accumulate<T>));
}

// Bytes of a tile of the spatial filter, in the L2 cache. For few channels it is read once, and
// what counts is that each plane of the filter is read in long pieces.
inline int64_t spatial_tile_bytes(const Geometry& g) {
  return (g.group_channels <= kBlockChannels ? 768 : 256) * 1024;
}

// Tap t of subpixel r of the pixel `down` rows below and `right` columns beside the filtered one.
inline Phase::Tap tap_of(const Geometry& g, const SpatialStrides& strides, int64_t r, int64_t t,
                         int64_t down, int64_t right) {
  return {r * g.channels * g.taps() + t, r * strides.subpixel + t * strides.tap, down, right};
}

template <class T, class Combine>
void forward_nchw(const Forward& f, ParallelFor run) {
  const Geometry& g = f.geometry;
  // Of few channels, a tile has the filters of one subpixel and the output of a row of subpixels.
  const int64_t tile_taps = g.group_channels <= kBlockChannels
                                ? g.taps() + (g.scale > 1 ? g.scale * g.group_channels : 0)
                                : g.subpixels() * g.taps();
  const Plan plan(g, spatial_row_bytes<T>(g.out_width, tile_taps),
                  f.channels_last ? shared_row_bytes<T>(g) : 0, spatial_tile_bytes(g));
  const PaddedTile<Accumulate<T>> padded(g, plan.rows);
  std::vector<Phase> phases;
  for (int64_t row = 0; row < g.scale; ++row)
    for (int64_t column = 0; column < g.scale; ++column) {
      Phase phase{row, column, {}, padded.offsets_of_taps()};
      for (int64_t t = 0; t < g.taps(); ++t)
        phase.taps.push_back(tap_of(g, f.spatial_strides, row * g.scale + column, t, 0, 0));
      phases.push_back(phase);
    }
  filter_nchw<T, Combine>(g, plan, padded, phases, static_cast<const T*>(f.features), g,
                          static_cast<const T*>(f.channel_filter),
                          static_cast<const T*>(f.spatial_filter), f.spatial_strides,
                          static_cast<T*>(f.output), g.scale * g.out_height, g.scale * g.out_width,
                          g.scale, f.channels_last, TypedPackOptions<Accumulate<T>>(f.pack), run);
}

// Each pixel of the features gathers from all subpixels of the output pixels that read it.
template <class T, class Combine>
void grad_features_upsample_nchw(const Backward& b, ParallelFor run) {
  const Geometry& g = b.geometry;
  // Windows of grad, which start `halo` before the first subpixel of a pixel.
  const int64_t after = (g.kernel - 1) * g.dilation - g.padding();
  const int64_t halo = g.scale * std::max(g.padding(), after) + g.scale - 1;
  Geometry padded_geometry = g;
  padded_geometry.is_valid = false;
  padded_geometry.height = g.scale * g.out_height;
  padded_geometry.width = g.scale * g.out_width;
  padded_geometry.out_height = g.height;
  padded_geometry.out_width = g.width;
  padded_geometry.kernel = 2 * halo + 1;
  padded_geometry.dilation = 1;
  padded_geometry.stride = g.scale;
  const Plan plan(padded_geometry, spatial_row_bytes<T>(g.width, g.subpixels() * g.taps()),
                  b.channels_last ? shared_row_bytes<T>(g) : 0, spatial_tile_bytes(g));
  const PaddedTile<Accumulate<T>> padded(padded_geometry, plan.rows);
  Phase phase{0, 0, {}, {}};
  for (int64_t r = 0; r < g.subpixels(); ++r)
    for (int64_t t = 0; t < g.taps(); ++t) {
      const int64_t down = g.padding() - t / g.kernel * g.dilation;
      const int64_t right = g.padding() - t % g.kernel * g.dilation;
      phase.taps.push_back(tap_of(g, b.spatial_strides, r, t, down, right));
      phase.x_offset.push_back(padded.offset_of(g.scale * down + r / g.scale + halo,
                                                g.scale * right + r % g.scale + halo));
    }
  filter_nchw<T, Combine>(padded_geometry, plan, padded, {phase}, static_cast<const T*>(b.grad), g,
                          static_cast<const T*>(b.channel_filter),
                          static_cast<const T*>(b.spatial_filter), b.spatial_strides,
                          static_cast<T*>(b.grad_features), g.height, g.width, 1, b.channels_last,
                          TypedPackOptions<Accumulate<T>>(), run);
}

// Each pixel of the features gathers from the output pixels that read it. With a stride, the taps
// by which they read it depend on its phase, its position modulo the stride.
template <class T, class Combine>
void grad_features_nchw(const Backward& b, ParallelFor run) {
  const Geometry& g = b.geometry;
  if (g.scale > 1) return grad_features_upsample_nchw<T, Combine>(b, run);
  // Windows of grad from which the pixels of a phase gather.
  const int64_t after = (g.kernel - 1) * g.dilation - g.padding();
  const int64_t halo = ceil_div(std::max(g.padding(), after), g.stride);
  Geometry padded_geometry = g;
  padded_geometry.is_valid = false;
  padded_geometry.height = g.out_height;
  padded_geometry.width = g.out_width;
  padded_geometry.out_height = ceil_div(g.height, g.stride);
  padded_geometry.out_width = ceil_div(g.width, g.stride);
  padded_geometry.kernel = 2 * halo + 1;
  padded_geometry.dilation = padded_geometry.stride = 1;
  const Plan plan(padded_geometry, spatial_row_bytes<T>(padded_geometry.out_width, g.taps()),
                  b.channels_last ? shared_row_bytes<T>(g) : 0, spatial_tile_bytes(g));
  const PaddedTile<Accumulate<T>> padded(padded_geometry, plan.rows);
  std::vector<Phase> phases;
  for (int64_t row = 0; row < std::min(g.stride, g.height); ++row)
    for (int64_t column = 0; column < std::min(g.stride, g.width); ++column) {
      Phase phase{row, column, {}, {}};
      for (int64_t t = 0; t < g.taps(); ++t) {
        const int64_t down = row + g.padding() - t / g.kernel * g.dilation;
        const int64_t right = column + g.padding() - t % g.kernel * g.dilation;
        if (down % g.stride || right % g.stride) continue;
        phase.taps.push_back(tap_of(g, b.spatial_strides, 0, t, down / g.stride, right / g.stride));
        phase.x_offset.push_back(padded.offset_of(down / g.stride + halo, right / g.stride + halo));
      }
      phases.push_back(phase);
    }
  filter_nchw<T, Combine>(padded_geometry, plan, padded, phases, static_cast<const T*>(b.grad), g,
                          static_cast<const T*>(b.channel_filter),
                          static_cast<const T*>(b.spatial_filter), b.spatial_strides,
                          static_cast<T*>(b.grad_features), g.height, g.width, g.stride,
                          b.channels_last, TypedPackOptions<Accumulate<T>>(), run);
}

// A tile of the spatial filter of one group, to[t * plane + i * pitch + j], widened.
template <class T>
void fill_spatial(Accumulate<T>* to, int64_t plane, int64_t pitch, const Geometry& g,
                  const T* filter, const SpatialStrides& strides, int64_t image, int64_t group,
                  int64_t row0, int64_t row1, Accumulate<T> neutral) {
  if (filter) filter += strides.start(image, g.subpixels()) + group * g.taps() * strides.tap;
  int64_t columns = g.out_width;
  // Rows without gaps between them are one row.
  if (pitch == columns && strides.row == columns && strides.column == 1) {
    if (filter) filter += row0 * columns;
    columns *= row1 - row0;
    row0 = 0;
    row1 = 1;
  }
  for (int64_t row = row0; row < row1; ++row) {
    Accumulate<T>* line = to + (row - row0) * pitch;
    if (filter && strides.tap == 1)
      transpose(line, plane, filter + row * strides.row, strides.column, columns, g.taps());
    else
      for (int64_t t = 0; t < g.taps(); ++t, line += plane)
        if (filter)
          load_row(line, filter + t * strides.tap + row * strides.row, columns, strides.column);
        else
          std::fill(line, line + columns, neutral);
  }
}

// Taps of NC channels side by side, to[t * NC + n].
template <int NC, class T>
void fill_channel(Accumulate<T>* to, const T* filter, int64_t taps, Accumulate<T> neutral) {
  for (int64_t t = 0; t < taps; ++t)
    for (int n = 0; n < NC; ++n)
      to[t * NC + n] = filter == nullptr ? neutral : widen(filter[n * taps + t]);
}

// Both filter gradients of a tile, for NC channels: with p = dy * x at each tap,
// grad_spatial[t] += p * c[t] and grad_channel[t] += p * s[t] (p alone for Add). dy has the layout
// of x; s and ds are [taps][plane], in rows of `pitch`. Not inlined, so that compilers keep its
// pointers in registers.
template <class T, class Combine, int NC>
__attribute__((noinline)) void grad_filter_rows(int64_t taps, int64_t rows, int64_t width,
                                                const int64_t* x_offset, int64_t line,
                                                const Accumulate<T>* x, const Accumulate<T>* dy,
                                                int64_t pitch, int64_t plane,
                                                const Accumulate<T>* s, const Accumulate<T>* c,
                                                Accumulate<T>* ds, Accumulate<T>* dc) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  const int64_t whole = width / L * L, next_row = kBlockChannels * line - whole;
  const auto inside = first_lanes<A, L>(width - whole);
  int64_t line3 = 3 * line;
  DDF_OPAQUE(line3);
  for (int64_t t = 0; t < taps; ++t) {
    // A power of two for sum_lanes_of_each.
    constexpr int kSums = NC == 3 ? 4 : NC;
    V sums[kSums] = {};
    V channel[NC];
    for (int n = 0; n < NC; ++n) channel[n] = splat<A, L>(c[t * NC + n]);
    const A *from = x + x_offset[t], *grad = dy, *filter = s + t * plane;
    A* to = ds + t * plane;
    // is_whole is an integral constant. Lanes after the end of the row may hold features that are
    // not finite: their product with a zero gradient is NaN, hence the mask.
    const auto add = [&](auto is_whole) __attribute__((always_inline)) {
      const V spatial = load<L>(filter);
      V total = load<L>(to);
      DDF_UNROLL
      for (int n = 0; n < NC; ++n) {
        const int64_t at = n == 3 ? line3 : n * line;
        V product = load<L>(grad + at) * load<L>(from + at);
        if constexpr (!decltype(is_whole)::value) product = inside ? product : V{};
        total += Combine::grad_spatial(product, channel[n], spatial);
        sums[n] += Combine::grad_channel(product, channel[n], spatial);
      }
      store<L>(to, total);
    };
    for (int64_t i = 0; i < rows; ++i) {
      if (whole == 0) {
        add(std::true_type());
      } else {
        for (const A* const end = from + whole; from < end;
             from += L, grad += L, filter += L, to += L)
          add(std::true_type());
        if (whole < width) add(std::false_type());
      }
      from += next_row;
      grad += next_row;
      filter += pitch - whole;
      to += pitch - whole;
    }
    // In rows shorter than a vector, the lanes after the end are the same in each row.
    if (whole == 0)
      for (int n = 0; n < NC; ++n) sums[n] = inside ? sums[n] : V{};
    A totals[kSums];
    sum_lanes_of_each<A, L>(sums, totals);
    for (int n = 0; n < NC; ++n) dc[n * taps + t] = totals[n];
  }
}

template <class T, class Combine>
void grad_filters_nchw(const Backward& b, ParallelFor run) {
  using A = Accumulate<T>;
  const Geometry g = by_subpixel(b.geometry);
  const int64_t pitch = round_up(g.out_width, kLanes<A>);
  // All taps read the same features and gradients of a channel block, from the L1 cache.
  const Plan plan(g, 16 * pitch * static_cast<int64_t>(sizeof(A)),
                  b.channels_last ? shared_row_bytes<T>(g) : 0);
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* features = static_cast<const T*>(b.features);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const auto* spatial_filter = static_cast<const T*>(b.spatial_filter);
  const int64_t out_size = g.out_height * g.out_width;
  const ChannelPartials<T> channel_partials(b, g, plan);
  SpatialPartials<T> spatial_partials(b, g, plan);
  const ImageStrides x_strides(b.channels_last, g.channels, g.height, g.width);
  const ImageStrides dy_strides(b.channels_last, g.channels, g.scale * g.out_height,
                                g.scale * g.out_width);

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    const PaddedTile<A> padded(g, plan.rows);
    const std::vector<int64_t> offsets = padded.offsets_of_taps();
    const int64_t plane = plan.rows * pitch;
    Scratch<A> spatial(g.taps() * plane), channel(g.taps() * kBlockChannels),
        dy(plan.rows * padded.pitch);
    Scratch<A> grad_spatial(g.taps() * plane);
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      const int64_t rows = item.row1 - item.row0;
      Scratch<A> x(padded.size);
      std::fill(grad_spatial.get(), grad_spatial + g.taps() * plane, A(0));
      fill_spatial(spatial.get(), plane, pitch, g, spatial_filter, b.spatial_strides, item.image,
                   item.group, item.row0, item.row1, A(Combine::kNeutral));
      for_each_channel_block(item.channel0, item.channel1, [&](int64_t c, auto count) {
        constexpr int NC = decltype(count)::value;
        fill_channel<NC>(
            channel.get(),
            channel_filter ? channel_filter + (item.image * g.channels + c) * g.taps() : nullptr,
            g.taps(), A(Combine::kNeutral));
        const int64_t image = item.image / g.subpixels(), r = item.image % g.subpixels();
        const bool is_ahead = c + 2 * NC <= item.channel1 && !b.channels_last;
        padded.template fill<NC>(
            x.get(), features + image * g.channels * g.height * g.width + c * x_strides.channel,
            x_strides, item.row0, is_ahead ? NC * x_strides.channel : 0);
        // The first row of the subpixel.
        const T* dy_row =
            grad + image * g.channels * g.subpixels() * out_size + c * dy_strides.channel +
            (item.row0 * g.scale + r / g.scale) * dy_strides.row + r % g.scale * dy_strides.pixel;
        for (int n = 0; n < NC && is_ahead; ++n)
          prefetch_rows(dy_row + (NC + n) * dy_strides.channel, g.scale * dy_strides.row, rows,
                        g.scale * g.out_width);
        if (g.scale == 1 && dy_strides.pixel == 1)
          for (int n = 0; n < NC; ++n)
            load_rows(dy + n * padded.line, padded.pitch, dy_row + n * dy_strides.channel,
                      dy_strides.row, rows, g.out_width);
        else
          for (int64_t i = 0; i < rows; ++i)
            load_channels(dy + i * padded.pitch, padded.line, dy_row + i * g.scale * dy_strides.row,
                          dy_strides, NC, g.out_width, g.scale);
        A* to = channel_partials.at(item.image, item.tile, c);
        grad_filter_rows<T, Combine, NC>(g.taps(), rows, g.out_width, offsets.data(), padded.line,
                                         x, dy, pitch, plane, spatial, channel, grad_spatial, to);
      });
      for (int64_t i = 0; i < rows; ++i)
        spatial_partials.add(item.channel_block, item.image, item.group, item.row0 + i,
                             grad_spatial + i * pitch, plane);
    }
  });
  channel_partials.write(run);
  spatial_partials.write(run);
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
