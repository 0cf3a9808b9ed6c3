// The gradients of both filters in one pass over grad and features for 3 x 3 windows of any
// dilation, stride and memory strides, such as the subpixels of ddf_up's grad: as grad_filters.cuh,
// but a lane gathers what its pixels read, as in gather_3x3.cuh.
#pragma once
#include "gather_3x3.cuh"
#include "grad_filters.cuh"

namespace ddf::cuda {

constexpr int kGatheredPixels = 2;  // of a lane
constexpr int kGatheredTile = kGatheredPixels * kLanes;
constexpr int kGatheredWarps = 4;  // divide the channels
constexpr int kGatheredThreads = kGatheredWarps * kLanes;
// Floats of shared memory for the sums of half of the warps.
constexpr int kGatheredSharedFloats = kGatheredWarps / 2 * 9 * kGatheredPixels * kLanes;

template <typename T, typename Combine>
DDF_KERNEL(kGatheredThreads, 3)
grad_filters_gathered(Arguments<T> a, PartialSums<T> partials) {
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int lane = thread_index() % kLanes, warp = thread_index() / kLanes;
  const auto [tile, channel_block, group, batch] =
      place_of_block(partials.tiles, partials.channel_blocks, g);
  const int rows = g.out_height, columns = g.out_width;
  const int row_stride = a.features.row_stride, column_stride = a.features.column_stride;

  bool active[kGatheredPixels];
  int row[kGatheredPixels], column[kGatheredPixels], grad_offset[kGatheredPixels];
  int offsets[kGatheredPixels][9];
  bool inside[kGatheredPixels][9];
  float spatial_taps[kGatheredPixels][9];
  float spatial_sums[kGatheredPixels * 9] = {};
  DDF_UNROLL
  for (int p = 0; p < kGatheredPixels; ++p) {
    const int pixel = tile * kGatheredTile + p * kLanes + lane;
    active[p] = pixel < rows * columns;
    row[p] = active[p] ? pixel / columns : 0;
    column[p] = active[p] ? pixel % columns : 0;
    grad_offset[p] = row[p] * static_cast<int>(a.grad.row_stride) +
                     column[p] * static_cast<int>(a.grad.column_stride);
    DDF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int y = gathered_from<false>(row[p], tap / 3, g, g.height);
      const int x = gathered_from<false>(column[p], tap % 3, g, g.width);
      inside[p][tap] = y >= 0 && x >= 0;
      offsets[p][tap] = inside[p][tap] ? y * row_stride + x * column_stride : 0;
      spatial_taps[p][tap] =
          Combine::kGradReadsFilters && a.spatial_filter.data != nullptr
              ? load(a.spatial_filter.at(batch, group * 9 + tap, row[p], column[p]))
              : Combine::kNeutral;
    }
  }

  const int first = channel_block * partials.block_channels + warp;
  const int64_t block_end = static_cast<int64_t>(channel_block + 1) * partials.block_channels;
  const int end = block_end < g.group_channels ? block_end : g.group_channels;
  const int64_t channel = group * g.group_channels + first;
  const T* features = a.features.at(batch, channel, 0, 0);
  const T* gradient = a.grad.at(batch, channel, 0, 0);
  const T* channel_taps = a.channel_filter.at(batch, channel, 0, 0);
  float* partial = partials.channel_at(g, tile, batch, channel);
  DDF_UNROLL_NOT
  for (int i = first; i < end; i += kGatheredWarps) {
    float grad[kGatheredPixels], values[kGatheredPixels][9];
    DDF_UNROLL
    for (int p = 0; p < kGatheredPixels; ++p) {
      grad[p] = load(gradient + grad_offset[p]);
      DDF_UNROLL
      for (int tap = 0; tap < 9; ++tap) values[p][tap] = load(features + offsets[p][tap]);
    }
    float channel_sums[9] = {};
    DDF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      float per_channel = Combine::kNeutral;
      if (Combine::kGradReadsFilters && a.channel_filter.data != nullptr) {
        per_channel = load(channel_taps + tap / 3 * a.channel_filter.row_stride +
                           tap % 3 * a.channel_filter.column_stride);
      }
      DDF_UNROLL
      for (int p = 0; p < kGatheredPixels; ++p) {
        const float term = grad[p] * (inside[p][tap] ? values[p][tap] : 0.f);
        spatial_sums[p * 9 + tap] += Combine::grad_spatial(term, per_channel, spatial_taps[p][tap]);
        if (active[p]) {
          channel_sums[tap] += Combine::grad_channel(term, per_channel, spatial_taps[p][tap]);
        }
      }
    }
    if (partials.channel_partials != nullptr) {
      sum_over_lanes(channel_sums, lane, kLanes);
      if (lane < 8) store(partial + lane, channel_sums[0]);
      if (lane == 8) store(partial + 8, channel_sums[8]);
    }
    features += kGatheredWarps * a.features.channel_stride;
    gradient += kGatheredWarps * a.grad.channel_stride;
    channel_taps += kGatheredWarps * a.channel_filter.channel_stride;
    partial += kGatheredWarps * 9;
  }

  if (!partials.needs_spatial()) return;
  sum_over_warps<kGatheredWarps>(spatial_sums, shared, warp, lane);
  if (warp != 0) return;
  DDF_UNROLL
  for (int p = 0; p < kGatheredPixels; ++p) {
    if (!active[p]) continue;
    DDF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      partials.store_spatial(g, channel_block, batch, group * 9 + tap, row[p], column[p],
                             spatial_sums[p * 9 + tap]);
    }
  }
}

}  // namespace ddf::cuda
