// All three gradients in one pass over grad and features, for 3 x 3 windows of stride and dilation
// 1 over channels that are contiguous in memory (channels_last).
// A thread has 4 neighbouring channels of a filter group and slides along strips of two rows of
// pixels of the features; the outputs that read them are their neighbours in grad. A step computes
// two columns, while the next two are copied to shared memory. grad_spatial is summed over the
// lanes of a warp, which takes the place of the taps in shared memory, and over the warps of a
// block that divide the channels; grad_channel in registers over the pixels of a tile, then over
// the tiles by reduce_partials.
#pragma once
#include "backward_3x3.cuh"
#include "grad_filters_channels_last.cuh"

namespace ddf::cuda {

constexpr int kPairRows = 2;     // of a strip
constexpr int kPairColumns = 2;  // of a step
// Columns of a tile, at most; by 15, the taps of the strips of a warp begin in different banks.
constexpr int kPairTileColumns = 15;
constexpr int kPairPixels = kPairRows * kPairTileColumns;
constexpr int kMostPairs = 8;  // of rows of a tile
// Floats of shared memory for the taps of a pixel, 16-byte aligned, and then for its sums.
constexpr int kPairTapStride = 12;
constexpr int kPairFloats = kPairPixels * kPairTapStride;
// What a thread copies for a column: two rows of grad around the two of grad and features.
constexpr int kPairVectors = 2 * kPairRows + 2;
// Floats of shared memory for the copies of a step.
template <typename T>
constexpr int kPairCopied =
    kPairColumns * kPairVectors * static_cast<int>(sizeof(T)) * kBackwardThreads;

struct PairGrid {
  int columns, per_row;  // columns of a tile; tiles in a row of the image
  int pairs;             // pairs of rows of a tile
  int lanes;             // quadruples of channels of a warp: 8, 16 or 32
  int channel_warps;     // warps of a block that divide the channels; the others divide the tiles
};

// Floats of shared memory of a block.
template <typename T>
int pair_shared_floats(const PairGrid& grid) {
  return kPairCopied<T> + kBackwardWarps * (kLanes / grid.lanes) * kPairFloats;
}

// a.result is grad_features, or its data is null. partials.channel_blocks is the number of blocks
// that divide the channels of a group.
template <typename T, typename Combine>
DDF_KERNEL(kBackwardThreads, 2)
backward_3x3_channels_last(Arguments<T> a, PartialSums<T> partials, PairGrid grid) {
  constexpr int kTaps = kBackwardTaps;
  constexpr int kRows = kPairRows;
  constexpr int kColumns = kPairColumns;
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int height = g.height;
  const int width = g.width;
  const int lane = thread_index() % kLanes % grid.lanes;
  const int warp = thread_index() / kLanes;
  const int strips = kLanes / grid.lanes;
  const int strip = thread_index() % kLanes / grid.lanes;
  const int tile_warps = kBackwardWarps / grid.channel_warps;
  const int channel_warp = warp % grid.channel_warps;

  // At most INT32_MAX strips.
  const unsigned block = block_index();
  const int channel_block = block % static_cast<unsigned>(partials.channel_blocks);
  unsigned index = block / static_cast<unsigned>(partials.channel_blocks) * tile_warps;
  index = (index + warp / grid.channel_warps) * strips + strip;
  const unsigned groups = g.groups;
  const bool in_tile = index < static_cast<unsigned>(g.batch) * groups * partials.tiles;
  if (!in_tile) index = 0;
  const unsigned image = index / partials.tiles;
  const int tile = index - image * partials.tiles;
  const int group = image % groups;
  const int batch = image / groups;

  const int quad = (channel_block * grid.channel_warps + channel_warp) * grid.lanes + lane;
  const bool active = in_tile && quad * kQuadChannels < g.group_channels;
  const int channel =
      group * static_cast<int>(g.group_channels) + (active ? quad * kQuadChannels : 0);
  const int plane = group * kTaps;
  const int left = tile % grid.per_row * grid.columns;
  const int first_row = tile / grid.per_row * grid.pairs * kRows;
  const int tile_end = left + grid.columns;
  const int end = tile_end < width ? tile_end : width;

  // Floats of a vector.
  constexpr int kFloats = sizeof(T);
  auto* const vectors = shared + thread_index() * kFloats;
  auto* const taps_of_warps = shared + kPairCopied<T> + strip * kPairFloats;
  auto* pixel_taps = taps_of_warps + warp * strips * kPairFloats;
  const auto vector_at = [&](int y, int x) {
    return vectors + (x * kPairVectors + y) * kBackwardThreads * kFloats;
  };

  float channel_taps[kTaps][kQuadChannels];
  float channel_sums[kTaps][kQuadChannels];
  DDF_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kQuadChannels; ++i) {
      channel_sums[tap][i] = 0.f;
      channel_taps[tap][i] = active && a.channel_filter.data != nullptr
                                 ? load(a.channel_filter.at(batch, channel + i, tap / 3, tap % 3))
                                 : Combine::kNeutral;
    }
  }

  DDF_UNROLL_NOT
  for (int pair = 0; pair < grid.pairs; ++pair) {
    const int row = first_row + pair * kRows;
    unsigned rows_inside = 0;  // 3 bits for each, as many as columns of a window
    DDF_UNROLL
    for (int y = 0; y < kRows + 2; ++y) {
      if (active && row < height && row + y >= 1 && row + y <= height) rows_inside |= 7u << 3 * y;
    }
    const auto row_inside = [&](int y) { return (rows_inside >> 3 * y & 1) != 0; };
    const T* gradient = a.grad.at(batch, channel, row - 1, left - 1);
    const T* features = a.features.at(batch, channel, row, left);
    T* target = a.result.at(batch, channel, row, left);
    float window[kColumns + 2][kRows + 2][kQuadChannels];  // [column][row]
    const auto load_column = [&](float (&to)[kRows + 2][kQuadChannels], bool column_inside) {
      DDF_UNROLL
      for (int y = 0; y < kRows + 2; ++y) {
        load4_if(to[y], gradient + y * a.grad.row_stride, row_inside(y) && column_inside);
      }
      gradient += a.grad.column_stride;
    };
    // The features of the columns of a step, and grad on their right.
    const auto copy_columns = [&](int column) {
      DDF_UNROLL
      for (int x = 0; x < kColumns; ++x) {
        DDF_UNROLL
        for (int y = 0; y < kRows + 2; ++y) {
          copy_to_shared_if<4>(vector_at(y, x), gradient + y * a.grad.row_stride,
                               row_inside(y) && column + x + 1 < width);
        }
        DDF_UNROLL
        for (int y = 0; y < kRows; ++y) {
          copy_to_shared_if<4>(vector_at(kRows + 2 + y, x), features + y * a.features.row_stride,
                               row_inside(y + 1) && column + x < width);
        }
        gradient += a.grad.column_stride;
        features += a.features.column_stride;
      }
      end_copies();
    };
    load_column(window[0], left > 0);
    load_column(window[1], true);
    copy_columns(left);

    for (int i = lane; i < kPairPixels; i += grid.lanes) {
      const int y = row + i / kPairTileColumns;
      const int x = left + i % kPairTileColumns;
      float taps[kPairTapStride] = {};
      DDF_UNROLL
      for (int tap = 0; tap < kTaps; ++tap) {
        // Of the output that reads the pixel by this tap.
        const int out_y = y + 1 - tap / 3;
        const int out_x = x + 1 - tap % 3;
        const bool inside = in_tile && x < end && y < height && out_y >= 0 && out_y < height &&
                            out_x >= 0 && out_x < width;
        taps[tap] = Combine::kNeutral;
        if (inside && a.spatial_filter.data != nullptr) {
          taps[tap] = load(a.spatial_filter.at(batch, plane + tap, out_y, out_x));
        }
      }
      DDF_UNROLL
      for (int quarter = 0; quarter < kPairTapStride / 4; ++quarter) {
        store_shared4(pixel_taps + i * kPairTapStride + 4 * quarter, taps + 4 * quarter);
      }
    }
    sync_warp();

    // All lanes take all steps, because the sums over lanes need all of them.
    DDF_UNROLL_NOT
    for (int column = left; column < tile_end; column += kColumns) {
      DDF_UNROLL
      for (int step = 0; step < kColumns; ++step) {
        // Of an odd number of columns.
        if (step > 0 && column + step == tile_end) break;
        if (step == 0) await_copies<0>();
        float values[kRows][kQuadChannels];
        DDF_UNROLL
        for (int y = 0; y < kRows + 2; ++y) {
          load_copied4<T>(window[step + 2][y], vector_at(y, step));
        }
        DDF_UNROLL
        for (int y = 0; y < kRows; ++y) {
          load_copied4<T>(values[y], vector_at(kRows + 2 + y, step));
        }
        // Over what has been read.
        if (step + 1 == kColumns && column + kColumns < tile_end) copy_columns(column + kColumns);
        unsigned inside = column + step >= end ? 0 : rows_inside;
        if (column + step == 0) inside &= ~01111u;
        if (column + step + 1 == width) inside &= ~04444u;
        float sum_of[kRows], last_of[kRows];
        DDF_UNROLL
        for (int y = 0; y < kRows; ++y) {
          float taps[kPairTapStride];
          DDF_UNROLL
          for (int quarter = 0; quarter < kPairTapStride / 4; ++quarter) {
            load_shared4(taps + 4 * quarter,
                         pixel_taps + y * kPairTileColumns * kPairTapStride + 4 * quarter);
          }
          float sums[kQuadChannels] = {}, spatial_sums[kTaps] = {};
          DDF_UNROLL
          for (int tap = 0; tap < kTaps; ++tap) {
            const int under = y + 2 - tap / 3;
            const int x = 2 - tap % 3;
            // Outputs outside the image have no filter: 0 * Inf must not be added. The second row
            // of pixels may be outside, too.
            const bool has_output =
                (inside >> (3 * (y == 1 && under == 1 ? 2 : under) + x) & 1) != 0;
            DDF_UNROLL
            for (int i = 0; i < kQuadChannels; ++i) {
              const float output = window[step + x][under][i];
              const float term = values[y][i] * output;
              spatial_sums[tap] += Combine::grad_spatial(term, channel_taps[tap][i], taps[tap]);
              if (has_output) {
                sums[i] += Combine::weight(channel_taps[tap][i], taps[tap]) * output;
                channel_sums[tap][i] +=
                    Combine::grad_channel(term, channel_taps[tap][i], taps[tap]);
              }
            }
          }
          if (a.result.data != nullptr && (inside >> (3 * y + 4) & 1) != 0) {
            store4(target + y * a.result.row_stride, sums);
          }
          last_of[y] = spatial_sums[kTaps - 1];
          if (partials.needs_spatial()) spread_over_lanes(spatial_sums, lane);
          sum_of[y] = spatial_sums[0];
        }
        if (partials.needs_spatial()) {
          // Of the rows, by the lowest bit of the lane.
          const bool upper = (lane & 1) != 0;
          const float sent = upper ? last_of[0] : last_of[1];
          float last = (upper ? last_of[1] : last_of[0]) + shuffle_xor(sent, 1);
          last += shuffle_xor(last, 2);
          last += shuffle_xor(last, 4);
          DDF_UNROLL
          for (int distance = 8; distance < kLanes; distance *= 2) {
            if (grid.lanes > distance) {
              sum_of[0] += shuffle_xor(sum_of[0], distance);
              sum_of[1] += shuffle_xor(sum_of[1], distance);
              last += shuffle_xor(last, distance);
            }
          }
          // The taps are read before they are overwritten.
          sync_warp();
          constexpr int kRowFloats = kPairTileColumns * kPairTapStride;
          if (lane < kTaps - 1) {
            DDF_UNROLL
            for (int y = 0; y < kRows; ++y) pixel_taps[y * kRowFloats + lane] = sum_of[y];
          }
          if (lane < kRows) pixel_taps[lane * kRowFloats + kTaps - 1] = last;
        }
        target += a.result.column_stride;
        pixel_taps += kPairTapStride;
      }
      DDF_UNROLL
      for (int x = 0; x < 2; ++x) {
        DDF_UNROLL
        for (int y = 0; y < kRows + 2; ++y) {
          DDF_UNROLL
          for (int i = 0; i < kQuadChannels; ++i) window[x][y][i] = window[x + kColumns][y][i];
        }
      }
    }

    pixel_taps -= (tile_end - left) * kPairTapStride;

    // The sums of all warps of channels.
    sync_threads();
    if (partials.needs_spatial()) {
      const auto* const sums = taps_of_warps + (warp - channel_warp) * strips * kPairFloats;
      const int step = grid.channel_warps * grid.lanes;
      DDF_UNROLL_NOT
      for (int i = channel_warp * grid.lanes + lane; i < kTaps * kPairPixels; i += step) {
        // Neighbouring lanes store to places that are near in memory.
        const int tap = i % 3 + i / (3 * kPairTileColumns) % 3 * 3;
        const int pixel =
            i / 3 % kPairTileColumns + i / kTaps / kPairTileColumns * kPairTileColumns;
        const int y = row + pixel / kPairTileColumns;
        const int x = left + pixel % kPairTileColumns;
        if (!in_tile || y >= height || x >= end) continue;
        float sum = 0.f;
        for (int other_warp = 0; other_warp < grid.channel_warps; ++other_warp) {
          sum += sums[other_warp * strips * kPairFloats + pixel * kPairTapStride + tap];
        }
        store_sum_of_pixel(partials, g, channel_block, batch, group, tap, y, x, sum);
      }
    }
    // The sums are read before the next taps.
    sync_threads();
  }

  if (partials.channel_partials == nullptr || !active) return;
  float* const partial = partials.channel_at(g, tile, batch, channel);
  DDF_UNROLL
  for (int quarter = 0; quarter < kTaps; ++quarter) {
    float four[4];
    DDF_UNROLL
    for (int i = 0; i < 4; ++i) {
      four[i] = channel_sums[(4 * quarter + i) % kTaps][(4 * quarter + i) / kTaps];
    }
    store4(partial + 4 * quarter, four);
  }
}

}  // namespace ddf::cuda
