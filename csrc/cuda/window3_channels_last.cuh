// 3 x 3 windows of stride and dilation 1 over channels that are contiguous in memory
// (channels_last): the forward pass, and grad_features with the taps mirrored, as in window3.cuh.
//
// A thread owns 4 neighbouring channels of one filter group and slides along a strip of a row: the
// channel filters stay in registers, and each step loads one new column of the window.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kStripThreads = 128;
constexpr int kStripColumns = 16;
constexpr int kStripChannels = 4;
constexpr int kStripTaps = 9;

template <typename T, bool Mul, bool Mirrored>
DDF_KERNEL(kStripThreads, 3)
window3_channels_last(Arguments<T> a, int strips) {
  const Geometry& g = a.geometry;
  const int height = g.height;
  const int width = g.width;
  const int quads = g.channels / kStripChannels;
  unsigned index = static_cast<unsigned>(block_index()) * kStripThreads + thread_index();
  const int channel = index % quads * kStripChannels;
  index /= quads;
  const int left = index % strips * kStripColumns;
  index /= strips;
  const int row = index % height;
  const int batch = index / height;
  if (batch >= g.batch) return;
  // The filter that changes nothing.
  constexpr float neutral = Mul ? 1.f : 0.f;

  float channel_taps[kStripTaps][kStripChannels];
  DDF_UNROLL
  for (int tap = 0; tap < kStripTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kStripChannels; ++i) {
      channel_taps[tap][i] = a.channel_filter.data == nullptr
                                 ? neutral
                                 : load(a.channel_filter.at(batch, channel + i, tap / 3, tap % 3));
    }
  }

  const View<const T>& input = Mirrored ? a.grad : a.features;
  const int plane = channel / static_cast<int>(g.group_channels) * kStripTaps;
  const T* source = input.at(batch, channel, row - 1, left - 1);
  const T* spatial_filter = a.spatial_filter.at(batch, plane, row, left);
  T* target = a.result.at(batch, channel, row, left);
  const bool row_inside[3] = {row > 0, true, row + 1 < height};

  float window[3][3][kStripChannels];  // [column][row]
  const auto load_column = [&](float (&to)[3][kStripChannels], int column) {
    DDF_UNROLL
    for (int y = 0; y < 3; ++y) {
      DDF_UNROLL
      for (int i = 0; i < kStripChannels; ++i) to[y][i] = 0.f;
      if (row_inside[y] && column >= 0 && column < width) {
        load4(to[y], source + y * input.row_stride);
      }
    }
    source += input.column_stride;
  };
  load_column(window[0], left - 1);
  load_column(window[1], left);
  const int end = left + kStripColumns < width ? left + kStripColumns : width;
  // Unrolled by the columns of the window, so that columns change their role and not their place.
  DDF_UNROLL_3
  for (int column = left; column < end; ++column) {
    load_column(window[2], column + 1);
    float sums[kStripChannels] = {};
    DDF_UNROLL
    for (int tap = 0; tap < kStripTaps; ++tap) {
      const int y = Mirrored ? 2 - tap / 3 : tap / 3;
      const int x = Mirrored ? 2 - tap % 3 : tap % 3;
      // An output that is not there has no filter: its zero must not meet an Inf.
      const bool inside = row_inside[y] && column + x >= 1 && column + x <= width;
      if (Mirrored && !inside) continue;
      float spatial = neutral;
      if (a.spatial_filter.data != nullptr) {
        // Mirrored: the taps under which the pixel lies belong to the outputs around it.
        spatial = load(spatial_filter + tap * a.spatial_filter.channel_stride +
                       (Mirrored ? y - 1 : 0) * a.spatial_filter.row_stride +
                       (Mirrored ? x - 1 : 0) * a.spatial_filter.column_stride);
      }
      DDF_UNROLL
      for (int i = 0; i < kStripChannels; ++i) {
        const float filter = Mul ? channel_taps[tap][i] * spatial : channel_taps[tap][i] + spatial;
        sums[i] += window[x][y][i] * filter;
      }
    }
    store4(target, sums);
    target += a.result.column_stride;
    spatial_filter += a.spatial_filter.column_stride;
    DDF_UNROLL
    for (int y = 0; y < 3; ++y) {
      DDF_UNROLL
      for (int i = 0; i < kStripChannels; ++i) {
        window[0][y][i] = window[1][y][i];
        window[1][y][i] = window[2][y][i];
      }
    }
  }
}

}  // namespace ddf::cuda
