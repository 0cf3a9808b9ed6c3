// The gradients of both filters in one pass over grad and features, over rows that are contiguous
// in memory (NCHW), dilation 1.
// A block has a tile of outputs, a quad for each lane of a warp. 3 x 3: the warps
// divide the channels; grad_spatial is summed in registers over the channels of a warp, then over
// the warps. Larger: each warp has one row of taps, because registers hold no more, and all
// channels. grad_channel is summed over the lanes of a warp, then over the tiles by
// reduce_partials.
#pragma once
#include "load_row.cuh"
#include "reduce.cuh"

namespace ddf::cuda {

// Rows of taps of a warp, and warps that divide the channels.
constexpr int tap_rows(int kernel) { return kernel == 3 ? 3 : 1; }
constexpr int channel_warps(int kernel) { return kernel == 3 ? 4 : 1; }
constexpr int grad_filters_threads(int kernel) {
  return kLanes * channel_warps(kernel) * (kernel / tap_rows(kernel));
}
// Resident blocks of a multiprocessor, for which ptxas limits the registers.
constexpr int grad_filters_blocks(int kernel) { return kernel == 3 ? 3 : kernel == 5 ? 4 : 2; }
// Floats of shared memory for the sums of half of the warps.
constexpr int grad_filters_shared_floats(int kernel) {
  return channel_warps(kernel) / 2 * tap_rows(kernel) * kernel * kQuadOutputs * kLanes;
}
// Length of an array for sum_over_lanes that holds `taps` sums.
constexpr int summed_taps(int taps) { return taps == 7 ? 8 : taps; }

// Adds the sums of Warps warps in shared memory; the first gets the total.
template <int Warps, int N, typename Shared>
DDF_DEVICE void sum_over_warps(float (&sums)[N], Shared* shared, int warp, int lane) {
  DDF_UNROLL_NOT
  for (int half = Warps / 2; half >= 1; half /= 2) {
    auto* const slot = shared + warp % half * N * kLanes + lane;
    // The sums of the previous step are read before they are overwritten.
    sync_threads();
    if (warp >= half && warp < 2 * half) {
      DDF_UNROLL
      for (int i = 0; i < N; ++i) slot[i * kLanes] = sums[i];
    }
    sync_threads();
    if (warp < half) {
      DDF_UNROLL
      for (int i = 0; i < N; ++i) sums[i] += slot[i * kLanes];
    }
  }
}

// vector: the widths and the addresses of the rows, in elements, are multiples of 4.
template <typename T, int Kernel, int Stride, typename Combine>
DDF_KERNEL(grad_filters_threads(Kernel), grad_filters_blocks(Kernel))
grad_filters(Arguments<T> a, PartialSums<T> partials, QuadGrid grid, bool vector) {
  constexpr int kRows = tap_rows(Kernel);
  constexpr int kTaps = kRows * Kernel;
  constexpr int kWarps = channel_warps(Kernel);
  constexpr int kColumns = input_columns(Kernel, Stride);
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int width = g.width;
  const int out_width = g.out_width;
  const int lane = thread_index() % kLanes;
  const int warp = thread_index() / kLanes % kWarps;
  const int first_tap_row = thread_index() / kLanes / kWarps * kRows;
  const auto [tile, channel_block, group, batch] =
      place_of_block(partials.tiles, partials.channel_blocks, g);
  const QuadGrid::Place quad = grid.place_of(tile, lane);
  const int row = quad.row, left = quad.left;
  const bool active = row < g.out_height && left < out_width;
  const int top = row * Stride + first_tap_row - Kernel / 2;
  bool output_inside[kQuadOutputs];
  DDF_UNROLL
  for (int i = 0; i < kQuadOutputs; ++i) {
    output_inside[i] = active && left + i < out_width;
  }
  bool row_inside[kRows];
  DDF_UNROLL
  for (int y = 0; y < kRows; ++y) row_inside[y] = active && top + y >= 0 && top + y < g.height;

  const int64_t plane = group * Kernel * Kernel + first_tap_row * Kernel;
  float spatial_taps[kTaps][kQuadOutputs];
  float spatial_sums[kTaps * kQuadOutputs];
  DDF_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kQuadOutputs; ++i) {
      spatial_taps[tap][i] = Combine::kNeutral;
      spatial_sums[tap * kQuadOutputs + i] = 0.f;
    }
    if (!Combine::kGradReadsFilters || !active || a.spatial_filter.data == nullptr) continue;
    const T* const source = a.spatial_filter.at(batch, plane + tap, row, left);
    if (vector) {
      load4(spatial_taps[tap], source);
    } else {
      DDF_UNROLL
      for (int i = 0; i < kQuadOutputs; ++i) {
        if (output_inside[i]) spatial_taps[tap][i] = load(source + i);
      }
    }
  }

  const int first = channel_block * partials.block_channels + warp;
  const int64_t block_end = static_cast<int64_t>(channel_block + 1) * partials.block_channels;
  const int end = block_end < g.group_channels ? block_end : g.group_channels;
  const int64_t channel = group * g.group_channels + first;
  const T* features = a.features.at(batch, channel, top, left * Stride);
  const T* gradient = a.grad.at(batch, channel, row, left);
  const T* channel_taps = a.channel_filter.at(batch, channel, first_tap_row, 0);
  float* partial = partials.channel_at(g, tile, batch, channel) + first_tap_row * Kernel;
  DDF_UNROLL_NOT
  for (int i = first; i < end; i += kWarps) {
    float window[kRows][kColumns], grad[kQuadOutputs];
    int from = left * Stride;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    // Otherwise the comparisons of columns with the width stay in registers, and spill others.
    if (Kernel > 3) from = in_each_iteration(from);
#endif
    const auto load_rows = [&](auto aligned) {
      DDF_UNROLL
      for (int y = 0; y < kRows; ++y) {
        load_row<Kernel / 2, decltype(aligned)::value>(
            window[y], features + y * a.features.row_stride, from, width, row_inside[y]);
      }
    };
    if (vector) {
      load_rows(True{});
      load4_if(grad, gradient, active);
    } else {
      load_rows(False{});
      DDF_UNROLL
      for (int j = 0; j < kQuadOutputs; ++j) grad[j] = load_if(gradient + j, output_inside[j]);
    }

    float channel_sums[summed_taps(kTaps)] = {};
    DDF_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) {
      keep_branches();
      float per_channel = Combine::kNeutral;
      if (Combine::kGradReadsFilters && a.channel_filter.data != nullptr) {
        per_channel = load(channel_taps + tap / Kernel * a.channel_filter.row_stride +
                           tap % Kernel * a.channel_filter.column_stride);
      }
      DDF_UNROLL
      for (int j = 0; j < kQuadOutputs; ++j) {
        const float term = grad[j] * window[tap / Kernel][j * Stride + tap % Kernel];
        spatial_sums[tap * kQuadOutputs + j] +=
            Combine::grad_spatial(term, per_channel, spatial_taps[tap][j]);
        // Outputs after the end of the row have a zero grad, but their features may be NaN or Inf.
        if (output_inside[j])
          channel_sums[tap] += Combine::grad_channel(term, per_channel, spatial_taps[tap][j]);
      }
    }
    if (partials.channel_partials != nullptr) {
      sum_over_lanes(channel_sums, lane, kLanes);
      constexpr int kSpread = spread_of(summed_taps(kTaps));
      if (lane < kSpread && lane < kTaps) store(partial + lane, channel_sums[0]);
      if (kTaps > kSpread && lane == kSpread) store(partial + kSpread, channel_sums[kTaps - 1]);
    }
    features += kWarps * a.features.channel_stride;
    gradient += kWarps * a.grad.channel_stride;
    channel_taps += kWarps * a.channel_filter.channel_stride;
    partial += kWarps * Kernel * Kernel;
  }

  if (!partials.needs_spatial()) return;
  sum_over_warps<kWarps>(spatial_sums, shared, warp, lane);
  if (warp != 0) return;
  DDF_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kQuadOutputs; ++i) {
      if (output_inside[i]) {
        partials.store_spatial(g, channel_block, batch, plane + tap, row, left + i,
                               spatial_sums[tap * kQuadOutputs + i]);
      }
    }
  }
}

}  // namespace ddf::cuda
