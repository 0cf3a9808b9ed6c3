// 3 x 3 windows of stride and dilation 1 over rows that are contiguous in memory (NCHW): the
// forward pass and grad_features, which is a forward pass over grad with the taps mirrored.
// A thread computes 2 x 4 pixels of all channels of a channel block. The spatial filter of its
// pixels is in registers, the channel filters of the block in shared memory. If the image has fewer
// tiles than the block has threads, threads share the channels of a tile.
#pragma once
#include "filter_norm.cuh"

namespace ddf::cuda {

constexpr int kForward3x3Threads = 128;
constexpr int kTileRows = 2;
constexpr int kTileColumns = 4;
constexpr int kForward3x3Taps = 9;
// Floats from one channel to the next in shared memory, 16-byte aligned: nine taps and the bias.
constexpr int kTapStride = 12;

struct Tiling {
  int tiles_per_row, tiles;            // of one image
  int tile_lanes;                      // tiles of a block; divides kForward3x3Threads
  int block_channels, channel_blocks;  // channels of a block; blocks of a group
};

// Mirrored: grad_features. Vector: the width and the addresses of the rows, in elements, are
// multiples of 4. Pack: with the prologue and epilogue of a.pack.
template <typename T, typename Combine, bool Mirrored, bool Vector, bool Pack>
DDF_KERNEL(kForward3x3Threads, 4)
forward_3x3(Arguments<T> a, Tiling tiling) {
  static_assert(!Mirrored || !Pack);
  const Geometry& g = a.geometry;
  DDF_SHARED(float, channel_taps);
  const int height = g.height;
  const int width = g.width;
  const int all_channel_blocks = g.groups * tiling.channel_blocks;
  const int tile_blocks = (tiling.tiles + tiling.tile_lanes - 1) / tiling.tile_lanes;
  const int channel_block = block_index() % all_channel_blocks;
  const int tile_block = block_index() / all_channel_blocks % tile_blocks;
  const int64_t batch = block_index() / all_channel_blocks / tile_blocks;
  const int64_t group = channel_block / tiling.channel_blocks;
  const int skipped = channel_block % tiling.channel_blocks * tiling.block_channels;
  const int64_t first = group * g.group_channels + skipped;
  const int rest = g.group_channels - skipped;
  const int channels = rest < tiling.block_channels ? rest : tiling.block_channels;

  for (int i = thread_index(); i < channels * kForward3x3Taps; i += kForward3x3Threads) {
    const int channel = i / kForward3x3Taps;
    const int tap = i % kForward3x3Taps;
    channel_taps[channel * kTapStride + tap] =
        a.channel_filter.data == nullptr
            ? Combine::kNeutral
            : load(a.channel_filter.at(batch, first + channel, tap / 3, tap % 3));
  }
  if (Pack) {
    // The taps of a filter were written by several threads.
    sync_threads();
    for (int channel = thread_index(); channel < channels; channel += kForward3x3Threads) {
      auto* const taps = channel_taps + channel * kTapStride;
      normalize_channel<kForward3x3Taps>(a.pack, first + channel, taps, 1);
      taps[kForward3x3Taps] = a.pack.bias_of(first + channel);
    }
  }
  sync_threads();

  const int tile = tile_block * tiling.tile_lanes + thread_index() % tiling.tile_lanes;
  if (tile >= tiling.tiles) return;
  const int top = tile / tiling.tiles_per_row * kTileRows;
  const int left = tile % tiling.tiles_per_row * kTileColumns;

  float spatial_taps[kForward3x3Taps][kTileRows][kTileColumns];
  DDF_UNROLL
  for (int tap = 0; tap < kForward3x3Taps; ++tap) {
    DDF_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      // Mirrored: the taps that read a pixel belong to neighbouring outputs.
      const int y = top + row - (Mirrored ? tap / 3 - 1 : 0);
      const int x = left - (Mirrored ? tap % 3 - 1 : 0);
      float* const taps = spatial_taps[tap][row];
      DDF_UNROLL
      for (int column = 0; column < kTileColumns; ++column) taps[column] = Combine::kNeutral;
      if (a.spatial_filter.data == nullptr || y < 0 || y >= height) continue;
      const T* const source = a.spatial_filter.at(batch, group * kForward3x3Taps + tap, y, x);
      if (Vector && !Mirrored) {
        load4(taps, source);
      } else {
        DDF_UNROLL
        for (int column = 0; column < kTileColumns; ++column) {
          if (x + column >= 0 && x + column < width) taps[column] = load(source + column);
        }
      }
    }
  }

  if (Pack) {
    DDF_UNROLL
    for (int pixel = 0; pixel < kTileRows * kTileColumns; ++pixel) {
      normalize_spatial<kForward3x3Taps>(a.pack, &spatial_taps[0][0][0] + pixel,
                                         kTileRows * kTileColumns);
    }
  }

  constexpr int kRows = kTileRows + 2;
  constexpr int kColumns = kTileColumns + 2;
  bool row_inside[kRows], column_inside[kColumns];
  DDF_UNROLL
  for (int row = 0; row < kRows; ++row) {
    row_inside[row] = row == 1 || (top + row - 1 >= 0 && top + row - 1 < height);
  }
  DDF_UNROLL
  for (int column = 0; column < kColumns; ++column) {
    const bool surely = column == 1 || (Vector && column >= 1 && column <= kTileColumns);
    column_inside[column] = surely || (left + column - 1 >= 0 && left + column - 1 < width);
  }

  const View<const T>& input = Mirrored ? a.grad : a.features;
  const int lanes = kForward3x3Threads / tiling.tile_lanes;
  const int lane = thread_index() / tiling.tile_lanes;
  const T* source = input.at(batch, first + lane, top - 1, left - 1);
  T* target = a.result.at(batch, first + lane, top, left);
  const int64_t source_step = input.channel_stride * lanes;
  const int64_t target_step = a.result.channel_stride * lanes;
  DDF_UNROLL_NOT
  for (int channel = lane; channel < channels;
       channel += lanes, source += source_step, target += target_step) {
    float window[kRows][kColumns];
    DDF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const T* const line = source + row * input.row_stride;
      // float has nothing to convert, and unaligned rows would spill registers.
      if (Vector && sizeof(T) == 2) {
        window[row][0] = load_if(line, row_inside[row] && column_inside[0]);
        load4_if(&window[row][1], line + 1, row_inside[row]);
        window[row][kColumns - 1] =
            load_if(line + kColumns - 1, row_inside[row] && column_inside[kColumns - 1]);
        continue;
      }
      DDF_UNROLL
      for (int column = 0; column < kColumns; ++column) window[row][column] = 0.f;
      if (!row_inside[row]) continue;
      if (Vector) load4(&window[row][1], line + 1);
      DDF_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        if (Vector && column >= 1 && column <= kTileColumns) continue;
        if (column_inside[column]) window[row][column] = load(line + column);
      }
    }

    float taps[kTapStride];
    DDF_UNROLL
    for (int quarter = 0; quarter < kTapStride / 4; ++quarter) {
      load_shared4(taps + 4 * quarter, channel_taps + channel * kTapStride + 4 * quarter);
    }

    DDF_UNROLL
    for (int row = 0; row < kTileRows; ++row) {
      float sums[kTileColumns];
      DDF_UNROLL
      for (int column = 0; column < kTileColumns; ++column) {
        float sum = Pack ? taps[kForward3x3Taps] : 0.f;
        DDF_UNROLL
        for (int tap = 0; tap < kForward3x3Taps; ++tap) {
          const int y = row + (Mirrored ? 2 - tap / 3 : tap / 3);
          const int x = column + (Mirrored ? 2 - tap % 3 : tap % 3);
          const float spatial = spatial_taps[tap][row][column];
          const float filter = Combine::weight(taps[tap], spatial);
          // Outputs outside the image have no filter: 0 * Inf must not be added.
          if (!Mirrored || (row_inside[y] && column_inside[x])) sum += window[y][x] * filter;
        }
        sums[column] = Pack ? a.pack.clamp_min(sum) : sum;
      }
      if (row > 0 && !row_inside[row + 1]) continue;
      T* const line = target + row * a.result.row_stride;
      if (Vector) {
        store4(line, sums);
      } else {
        DDF_UNROLL
        for (int column = 0; column < kTileColumns; ++column) {
          if (column_inside[column + 1]) store(line + column, sums[column]);
        }
      }
    }
  }
}

}  // namespace ddf::cuda
