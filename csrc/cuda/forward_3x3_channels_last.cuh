// 3 x 3 windows of stride and dilation 1 over channels that are contiguous in memory
// (channels_last): the forward pass, and grad_features with the taps mirrored, as in
// forward_3x3.cuh.
// A thread has 4 neighbouring channels of a filter group and slides along a strip of two rows. The
// channel filters are in registers, the spatial filters of the strip in shared memory for all
// channels. Each step loads one new column of the window.
#pragma once
#include "filter_norm.cuh"

namespace ddf::cuda {

constexpr int kStripThreads = 128;
constexpr int kStripRows = 2;
constexpr int kStripColumns = 16;  // at most
constexpr int kStripChannels = 4;
constexpr int kStripTaps = 9;
constexpr int kStripPixels = kStripRows * kStripColumns;
// Floats of shared memory for the taps of a pixel, 16-byte aligned, and from one strip to the next:
// strips that a warp reads together begin in different banks.
constexpr int kStripTapStride = 12;
constexpr int kStripFloats = kStripPixels * kStripTapStride + 4;

struct StripGrid {
  int columns, per_row, rows;  // columns of a strip; strips per row and column of the image
  int lanes, channel_blocks;   // channel quadruples of a block; channel blocks of a group
  int per_block;
};

// Blocks of a multiprocessor, for which ptxas limits the registers. For sm_120 it takes 128 in
// these cases of what nvcc makes, enough for four blocks, but up to 136 of what NVRTC makes.
template <typename T, bool Mirrored, bool Pack>
constexpr int strip_blocks() {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 1200
  if (!Mirrored && Pack == (sizeof(T) == 4)) return 4;
#endif
  return 3;
}

template <typename T, typename Combine, bool Mirrored, bool Pack>
DDF_KERNEL(kStripThreads, strip_blocks<T, Mirrored, Pack>())
forward_3x3_channels_last(Arguments<T> a, StripGrid grid) {
  static_assert(!Mirrored || !Pack);
  const Geometry& g = a.geometry;
  DDF_SHARED(float, spatial_taps);
  const int height = g.height;
  const int width = g.width;
  const int64_t block = block_index() / grid.channel_blocks;
  const int channel_block = block_index() % grid.channel_blocks;
  const int64_t strips_of_image = static_cast<int64_t>(grid.per_row) * grid.rows;
  const int64_t count = strips_of_image * g.groups * g.batch;

  struct Place {
    int64_t batch;
    int group, top, left;
    bool inside;
  };
  const auto place_of = [&](int strip) {
    int64_t index = block * grid.per_block + strip;
    Place place;
    place.inside = index < count;
    if (!place.inside) index = 0;
    place.left = index % grid.per_row * grid.columns;
    index /= grid.per_row;
    place.top = index % grid.rows * kStripRows;
    index /= grid.rows;
    place.group = index % g.groups;
    place.batch = index / g.groups;
    return place;
  };

  for (int i = thread_index(); i < grid.per_block * kStripPixels; i += kStripThreads) {
    const Place place = place_of(i / kStripPixels);
    const int row = place.top + i / kStripColumns % kStripRows;
    const int column = place.left + i % kStripColumns;
    const bool inside = place.inside && row < height && column < width;
    float taps[kStripTapStride] = {};
    DDF_UNROLL
    for (int tap = 0; tap < kStripTaps; ++tap) {
      // Mirrored: the taps that read a pixel belong to neighbouring outputs.
      const int y = row + (Mirrored ? 1 - tap / 3 : 0);
      const int x = column + (Mirrored ? 1 - tap % 3 : 0);
      taps[tap] = Combine::kNeutral;
      if (a.spatial_filter.data != nullptr && inside &&
          (!Mirrored || (y >= 0 && y < height && x >= 0 && x < width))) {
        taps[tap] = load(a.spatial_filter.at(place.batch, place.group * kStripTaps + tap, y, x));
      }
    }
    if (Pack) normalize_spatial<kStripTaps>(a.pack, taps, 1);
    auto* const to =
        spatial_taps + i / kStripPixels * kStripFloats + i % kStripPixels * kStripTapStride;
    DDF_UNROLL
    for (int quarter = 0; quarter < kStripTapStride / 4; ++quarter) {
      store_shared4(to + 4 * quarter, taps + 4 * quarter);
    }
  }
  sync_threads();

  const int strip = thread_index() / grid.lanes;
  const int quad = channel_block * grid.lanes + thread_index() % grid.lanes;
  const Place place = place_of(strip);
  if (strip >= grid.per_block || !place.inside || quad * kStripChannels >= g.group_channels) {
    return;
  }
  const int64_t channel = place.group * g.group_channels + quad * kStripChannels;
  float channel_taps[kStripTaps][kStripChannels];
  DDF_UNROLL
  for (int tap = 0; tap < kStripTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kStripChannels; ++i) {
      channel_taps[tap][i] =
          a.channel_filter.data == nullptr
              ? Combine::kNeutral
              : load(a.channel_filter.at(place.batch, channel + i, tap / 3, tap % 3));
    }
  }
  float biases[kStripChannels] = {};
  DDF_UNROLL
  for (int i = 0; Pack && i < kStripChannels; ++i) {
    normalize_channel<kStripTaps>(a.pack, channel + i, &channel_taps[0][i], kStripChannels);
    biases[i] = a.pack.bias_of(channel + i);
  }

  constexpr int kRows = kStripRows + 2;
  const View<const T>& input = Mirrored ? a.grad : a.features;
  const T* source = input.at(place.batch, channel, place.top - 1, place.left - 1);
  T* target = a.result.at(place.batch, channel, place.top, place.left);
  const auto* spatial = spatial_taps + strip * kStripFloats;
  bool row_inside[kRows];
  DDF_UNROLL
  for (int y = 0; y < kRows; ++y) {
    row_inside[y] = y == 1 || (place.top + y >= 1 && place.top + y <= height);
  }
  float window[3][kRows][kStripChannels];  // [column][row]
  const auto load_column = [&](float (&to)[kRows][kStripChannels], bool column_inside) {
    DDF_UNROLL
    for (int y = 0; y < kRows; ++y) {
      load4_if(to[y], source + y * input.row_stride, row_inside[y] && column_inside);
    }
    source += input.column_stride;
  };
  const auto step = [&](int column, auto masked) {
    DDF_UNROLL
    for (int row = 0; row < kStripRows; ++row) {
      float taps[kStripTapStride];
      DDF_UNROLL
      for (int quarter = 0; quarter < kStripTapStride / 4; ++quarter) {
        load_shared4(taps + 4 * quarter,
                     spatial + row * kStripColumns * kStripTapStride + 4 * quarter);
      }
      float sums[kStripChannels];
      DDF_UNROLL
      for (int i = 0; i < kStripChannels; ++i) sums[i] = Pack ? biases[i] : 0.f;
      DDF_UNROLL
      for (int tap = 0; tap < kStripTaps; ++tap) {
        const int y = row + (Mirrored ? 2 - tap / 3 : tap / 3);
        const int x = Mirrored ? 2 - tap % 3 : tap % 3;
        // Outputs outside the image have no filter: 0 * Inf must not be added.
        if (masked && !(row_inside[y] && column + x >= 1 && column + x <= width)) continue;
        DDF_UNROLL
        for (int i = 0; i < kStripChannels; ++i) {
          const float filter = Combine::weight(channel_taps[tap][i], taps[tap]);
          sums[i] += window[x][y][i] * filter;
        }
      }
      DDF_UNROLL
      for (int i = 0; Pack && i < kStripChannels; ++i) sums[i] = a.pack.clamp_min(sums[i]);
      if (row == 0 || row_inside[row + 1]) store4(target + row * a.result.row_stride, sums);
    }
    target += a.result.column_stride;
    spatial += kStripTapStride;
  };
  load_column(window[0], place.left > 0);
  load_column(window[1], true);
  const bool rows_inside = row_inside[0] && row_inside[2] && row_inside[3];
  const int strip_end = place.left + grid.columns;
  const int end = strip_end < width ? strip_end : width;
  // Unrolled by the columns of the window, so that columns are renamed instead of moved.
  DDF_UNROLL_BY(3)
  for (int column = place.left; column < end; ++column) {
    load_column(window[2], column + 1 < width);
    if (!Mirrored || (rows_inside && column > 0 && column + 1 < width)) {
      step(column, False{});
    } else {
      step(column, True{});
    }
    DDF_UNROLL
    for (int y = 0; y < kRows; ++y) {
      DDF_UNROLL
      for (int i = 0; i < kStripChannels; ++i) {
        window[0][y][i] = window[1][y][i];
        window[1][y][i] = window[2][y][i];
      }
    }
  }
}

}  // namespace ddf::cuda
