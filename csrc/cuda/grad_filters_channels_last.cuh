// The gradients of both filters in one pass over grad and features, over channels that are
// contiguous in memory (channels_last), dilation 1.
// A thread has 4 neighbouring channels of a filter group and slides along strips of outputs; each
// step loads new columns of the window. grad_channel is summed in registers over the outputs of a
// tile, then over the tiles by reduce_partials; grad_spatial over the lanes of a warp, which hold
// the channels, then over the channel blocks by reduce_partials. Each warp has its own tiles; for
// windows larger than 3 x 3, registers hold one row of taps, so the warps of a block divide the
// rows of taps of a tile.
#pragma once
#include "grad_filters.cuh"

namespace ddf::cuda {

constexpr int kTileOutputRows = 8;
constexpr int kTileOutputColumns = 16;  // at most
constexpr int kQuadChannels = 4;

// Warps of a block with different tiles.
constexpr int tile_warps(int kernel) { return kernel == 3 ? 4 : 1; }
constexpr int grad_filters_channels_last_threads(int kernel) {
  return kLanes * tile_warps(kernel) * (kernel / tap_rows(kernel));
}
// Floats of shared memory for the taps of a pixel, 16-byte aligned, and for a block.
constexpr int quad_tap_stride(int kernel) { return kernel == 3 ? 12 : 8; }
constexpr int grad_filters_channels_last_shared_floats(int kernel) {
  // A warp has at most four strips.
  return grad_filters_channels_last_threads(kernel) / kLanes * 4 * kTileOutputColumns *
         quad_tap_stride(kernel);
}

struct TileGrid {
  int columns, per_row, rows;  // columns of a tile; tiles per row and column of the image
  int lanes;                   // quadruples of channels of a warp: 8, 16 or 32
};

// partials.channel_blocks is the number of warps that divide the channels of a group.
template <typename T, int Kernel, int Stride, typename Combine>
DDF_KERNEL(grad_filters_channels_last_threads(Kernel), Kernel == 7 ? 1 : 2)
grad_filters_channels_last(Arguments<T> a, PartialSums<T> partials, TileGrid grid) {
  constexpr int kRows = tap_rows(Kernel);
  constexpr int kTaps = kRows * Kernel;
  constexpr int kTileWarps = tile_warps(Kernel);
  constexpr int kSpread = spread_of(summed_taps(kTaps));
  constexpr int kTapStride = quad_tap_stride(Kernel);
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int width = g.width;
  const int lane = thread_index() % kLanes % grid.lanes;
  const int warp = thread_index() / kLanes;
  const int first_tap_row = warp / kTileWarps * kRows;
  const int strips = kLanes / grid.lanes;
  const int strip = thread_index() % kLanes / grid.lanes;

  const int channel_block = block_index() % partials.channel_blocks;
  int64_t index = block_index() / partials.channel_blocks * kTileWarps + warp % kTileWarps;
  const int64_t tiles_at_once = (partials.tiles + strips - 1) / strips;
  const int tile = index % tiles_at_once * strips + strip;
  index /= tiles_at_once;
  const int64_t group = index % g.groups;
  const int64_t batch = index / g.groups;
  const bool warp_active = batch < g.batch;
  if (!warp_active) return;

  const int quad = channel_block * grid.lanes + lane;
  const int left = tile % grid.per_row * grid.columns;
  const int first_row = tile / grid.per_row * kTileOutputRows;
  const bool in_tile = tile < partials.tiles;
  const bool active = in_tile && quad * kQuadChannels < g.group_channels;
  const int64_t channel = group * g.group_channels + (active ? quad * kQuadChannels : 0);
  const int64_t plane = group * Kernel * Kernel + first_tap_row * Kernel;
  auto* const warp_taps = shared + warp * 4 * kTileOutputColumns * kTapStride;
  auto* const strip_taps = warp_taps + strip * kTileOutputColumns * kTapStride;

  float channel_taps[kTaps][kQuadChannels];
  float channel_sums[kTaps][kQuadChannels];
  DDF_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kQuadChannels; ++i) {
      channel_sums[tap][i] = 0.f;
      channel_taps[tap][i] = Combine::kNeutral;
      if (Combine::kGradReadsFilters && active && a.channel_filter.data != nullptr) {
        channel_taps[tap][i] = load(
            a.channel_filter.at(batch, channel + i, first_tap_row + tap / Kernel, tap % Kernel));
      }
    }
  }

  DDF_UNROLL_NOT
  for (int row = first_row; row < first_row + kTileOutputRows; ++row) {
    const bool tile_row_active = in_tile && row < g.out_height;
    const bool row_active = active && tile_row_active;
    // The taps of the previous row are read before they are overwritten.
    sync_warp();
    for (int column = lane; column < kTileOutputColumns; column += grid.lanes) {
      const bool inside =
          in_tile && row < g.out_height && column < grid.columns && left + column < g.out_width;
      float taps[kTapStride] = {};
      DDF_UNROLL
      for (int tap = 0; tap < kTaps; ++tap) {
        taps[tap] = Combine::kNeutral;
        if (Combine::kGradReadsFilters && inside && a.spatial_filter.data != nullptr) {
          taps[tap] = load(a.spatial_filter.at(batch, plane + tap, row, left + column));
        }
      }
      DDF_UNROLL
      for (int quarter = 0; quarter < kTapStride / 4; ++quarter) {
        store_shared4(strip_taps + column * kTapStride + 4 * quarter, taps + 4 * quarter);
      }
    }
    sync_warp();

    const int top = row * Stride + first_tap_row - Kernel / 2;
    bool row_inside[kRows];
    DDF_UNROLL
    for (int y = 0; y < kRows; ++y) {
      row_inside[y] = row_active && top + y >= 0 && top + y < g.height;
    }
    int next = left * Stride - Kernel / 2;  // the column of the features to load
    const T* source = a.features.at(batch, channel, top, next);
    const T* gradient = a.grad.at(batch, channel, row, left);
    auto spatial = partials.spatial_at(g, channel_block, batch, plane + lane, row, left);
    auto last_spatial = partials.spatial_at(g, channel_block, batch, plane + kSpread, row, left);
    float window[Kernel][kRows][kQuadChannels];  // [column][row]
    const auto load_column = [&](float (&to)[kRows][kQuadChannels]) {
      DDF_UNROLL
      for (int y = 0; y < kRows; ++y) {
        load4_if(to[y], source + y * a.features.row_stride,
                 row_inside[y] && next >= 0 && next < width);
      }
      source += a.features.column_stride;
      ++next;
    };
    DDF_UNROLL
    for (int x = 0; x < Kernel - Stride; ++x) load_column(window[x]);
    // All lanes take all steps, because the sums over lanes need all of them. Unrolled by the
    // columns of the window, so that columns are renamed instead of moved.
    DDF_UNROLL_BY(Kernel)
    for (int column = 0; column < grid.columns; ++column) {
      const bool inside = row_active && left + column < g.out_width;
      float grad[kQuadChannels];
      load4_if(grad, gradient, inside);
      DDF_UNROLL
      for (int x = Kernel - Stride; x < Kernel; ++x) load_column(window[x]);
      float spatial_sums[summed_taps(kTaps)] = {};
      // 0 * Inf must not be added elsewhere.
      if (inside) {
        float taps[kTapStride];
        DDF_UNROLL
        for (int quarter = 0; quarter < kTapStride / 4; ++quarter) {
          load_shared4(taps + 4 * quarter, strip_taps + column * kTapStride + 4 * quarter);
        }
        DDF_UNROLL
        for (int tap = 0; tap < kTaps; ++tap) {
          DDF_UNROLL
          for (int i = 0; i < kQuadChannels; ++i) {
            const float term = grad[i] * window[tap % Kernel][tap / Kernel][i];
            channel_sums[tap][i] += Combine::grad_channel(term, channel_taps[tap][i], taps[tap]);
            spatial_sums[tap] += Combine::grad_spatial(term, channel_taps[tap][i], taps[tap]);
          }
        }
      }
      gradient += a.grad.column_stride;
      if (partials.needs_spatial()) {
        sum_over_lanes(spatial_sums, lane, grid.lanes);
        const bool stores = tile_row_active && left + column < g.out_width;
        if (stores && lane < kSpread && lane < kTaps) spatial.store(spatial_sums[0]);
        if (stores && kTaps > kSpread && lane == 0) last_spatial.store(spatial_sums[kTaps - 1]);
        spatial.advance();
        last_spatial.advance();
      }
      DDF_UNROLL
      for (int x = 0; x < Kernel - Stride; ++x) {
        DDF_UNROLL
        for (int y = 0; y < kRows; ++y) {
          DDF_UNROLL
          for (int i = 0; i < kQuadChannels; ++i) window[x][y][i] = window[x + Stride][y][i];
        }
      }
    }
  }

  if (partials.channel_partials == nullptr || !active) return;
  DDF_UNROLL
  for (int i = 0; i < kQuadChannels; ++i) {
    float* const partial =
        partials.channel_at(g, tile, batch, channel + i) + first_tap_row * Kernel;
    DDF_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) store(partial + tap, channel_sums[tap][i]);
  }
}

}  // namespace ddf::cuda
