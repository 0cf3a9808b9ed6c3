// The gradients of both filters in one pass over grad and features, for 3 x 3 windows of stride
// and dilation 1 over rows that are contiguous in memory (NCHW).
//
// A block owns a tile of pixels, 4 neighbours in a row for each lane of a warp, and every warp
// takes its share of the channels. grad_spatial is summed in registers over a warp's channels, then
// over the warps; grad_channel over a warp's lanes, then by sum_partials over the tiles.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kLanes = 32;
constexpr int kFilterWarps = 4;
constexpr int kFilterThreads = kFilterWarps * kLanes;
constexpr int kLanePixels = 4;
constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kLanes;
constexpr int kFilterTaps = 9;

// Floats of shared memory for half of the warps' sums.
constexpr int kFilterSharedFloats = kFilterWarps / 2 * kFilterTaps * kLanePixels * kLanes;

// Sums the first 8 of 9 values over the lanes; lanes 4 * i .. 4 * i + 3 return the sum of value i.
// Half of the values change hands at each step, so that 9 sums cost 14 shuffles, not 45. The last
// value is summed in place, for every lane.
DDF_DEVICE float sum_over_lanes(float (&values)[kFilterTaps], int lane) {
  DDF_UNROLL
  for (int kept = 4; kept >= 1; kept /= 2) {
    const int distance = 4 * kept;
    const bool upper = (lane & distance) != 0;
    DDF_UNROLL
    for (int i = 0; i < kept; ++i) {
      const float sent = upper ? values[i] : values[i + kept];
      values[i] = (upper ? values[i + kept] : values[i]) + shuffle_xor(sent, distance);
    }
  }
  values[0] += shuffle_xor(values[0], 2);
  values[0] += shuffle_xor(values[0], 1);
  DDF_UNROLL
  for (int distance = kLanes / 2; distance >= 1; distance /= 2) {
    values[kFilterTaps - 1] += shuffle_xor(values[kFilterTaps - 1], distance);
  }
  return values[0];
}

// result is grad_spatial, partials [tiles, B, C, 9] the sums of grad_channel over each tile; null
// where not wanted. Vector as for window3.
template <typename T, bool Mul, bool Vector>
DDF_KERNEL(kFilterThreads, 3)
filter_grads3(Arguments<T> a, float* partials, int tiles) {
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int height = g.height;
  const int width = g.width;
  const int lane = thread_index() % kLanes;
  const int warp = thread_index() / kLanes;
  const int tile = block_index() % tiles;
  const int64_t group = block_index() / tiles % g.groups;
  const int64_t batch = block_index() / tiles / g.groups;
  const int quads_per_row = (width + kLanePixels - 1) / kLanePixels;
  const int quad = tile * kLanes + lane;
  const int row = quad / quads_per_row;
  const int left = quad % quads_per_row * kLanePixels;
  const bool active = row < height;
  bool pixel_inside[kLanePixels];
  DDF_UNROLL
  for (int i = 0; i < kLanePixels; ++i) pixel_inside[i] = active && (Vector || left + i < width);

  float spatial_taps[kFilterTaps][kLanePixels];
  float spatial_sums[kFilterTaps][kLanePixels];
  DDF_UNROLL
  for (int tap = 0; tap < kFilterTaps; ++tap) {
    DDF_UNROLL
    for (int i = 0; i < kLanePixels; ++i) {
      spatial_taps[tap][i] = 1.f;
      spatial_sums[tap][i] = 0.f;
    }
    if (!Mul || !active || a.spatial_filter.data == nullptr) continue;
    const T* const source = a.spatial_filter.at(batch, group * kFilterTaps + tap, row, left);
    if (Vector) {
      load4(spatial_taps[tap], source);
    } else {
      DDF_UNROLL
      for (int i = 0; i < kLanePixels; ++i) {
        if (pixel_inside[i]) spatial_taps[tap][i] = load(source + i);
      }
    }
  }

  const int64_t first = group * g.group_channels + warp;
  const T* features = a.features.at(batch, first, row - 1, left - 1);
  const T* gradient = a.grad.at(batch, first, row, left);
  const T* channel_taps = a.channel_filter.at(batch, first, 0, 0);
  float* partial = partials + ((tile * g.batch + batch) * g.channels + first) * kFilterTaps;
  DDF_UNROLL_NOT
  for (int channel = warp; channel < g.group_channels; channel += kFilterWarps) {
    float window[3][kLanePixels + 2];
    float grad[kLanePixels];
    DDF_UNROLL
    for (int y = 0; y < 3; ++y) {
      DDF_UNROLL
      for (int x = 0; x < kLanePixels + 2; ++x) window[y][x] = 0.f;
      if (!active || row + y < 1 || row + y > height) continue;
      const T* const line = features + y * a.features.row_stride;
      if (Vector) load4(&window[y][1], line + 1);
      DDF_UNROLL
      for (int x = 0; x < kLanePixels + 2; ++x) {
        if (Vector && x >= 1 && x <= kLanePixels) continue;
        if (left + x >= 1 && left + x <= width) window[y][x] = load(line + x);
      }
    }
    DDF_UNROLL
    for (int i = 0; i < kLanePixels; ++i) grad[i] = 0.f;
    if (active) {
      if (Vector) {
        load4(grad, gradient);
      } else {
        DDF_UNROLL
        for (int i = 0; i < kLanePixels; ++i) {
          if (pixel_inside[i]) grad[i] = load(gradient + i);
        }
      }
    }

    float channel_sums[kFilterTaps];
    DDF_UNROLL
    for (int tap = 0; tap < kFilterTaps; ++tap) {
      float per_channel = 1.f;
      if (Mul && a.channel_filter.data != nullptr) {
        per_channel = load(channel_taps + tap / 3 * a.channel_filter.row_stride +
                           tap % 3 * a.channel_filter.column_stride);
      }
      channel_sums[tap] = 0.f;
      DDF_UNROLL
      for (int i = 0; i < kLanePixels; ++i) {
        const float term = grad[i] * window[tap / 3][i + tap % 3];
        spatial_sums[tap][i] += Mul ? term * per_channel : term;
        // A pixel behind the row's end has a zero grad, but its features may be NaN or Inf.
        if (Vector || pixel_inside[i]) {
          channel_sums[tap] += Mul ? term * spatial_taps[tap][i] : term;
        }
      }
    }
    if (partials != nullptr) {
      const float sum = sum_over_lanes(channel_sums, lane);
      if (lane % 4 == 0) store(partial + lane / 4, sum);
      if (lane == 1) store(partial + kFilterTaps - 1, channel_sums[kFilterTaps - 1]);
    }
    features += kFilterWarps * a.features.channel_stride;
    gradient += kFilterWarps * a.grad.channel_stride;
    channel_taps += kFilterWarps * a.channel_filter.channel_stride;
    partial += kFilterWarps * kFilterTaps;
  }

  if (a.result.data == nullptr) return;
  DDF_UNROLL_NOT
  for (int half = kFilterWarps / 2; half >= 1; half /= 2) {
    float* const slot = shared + warp % half * (kFilterSharedFloats / (kFilterWarps / 2)) + lane;
    // The sums of the step before are read before they are overwritten.
    sync_threads();
    if (warp >= half && warp < 2 * half) {
      DDF_UNROLL
      for (int tap = 0; tap < kFilterTaps; ++tap) {
        DDF_UNROLL
        for (int i = 0; i < kLanePixels; ++i) {
          slot[(tap * kLanePixels + i) * kLanes] = spatial_sums[tap][i];
        }
      }
    }
    sync_threads();
    if (warp < half) {
      DDF_UNROLL
      for (int tap = 0; tap < kFilterTaps; ++tap) {
        DDF_UNROLL
        for (int i = 0; i < kLanePixels; ++i) {
          spatial_sums[tap][i] += slot[(tap * kLanePixels + i) * kLanes];
        }
      }
    }
  }
  if (warp != 0 || !active) return;
  DDF_UNROLL
  for (int tap = 0; tap < kFilterTaps; ++tap) {
    T* const line = a.result.at(batch, group * kFilterTaps + tap, row, left);
    if (Vector) {
      store4(line, spatial_sums[tap]);
    } else {
      DDF_UNROLL
      for (int i = 0; i < kLanePixels; ++i) {
        if (pixel_inside[i]) store(line + i, spatial_sums[tap][i]);
      }
    }
  }
}

// grad_channel, the sums of partials over the tiles: a warp of neighbouring values, and the tiles
// shared among the warps of a block.
template <typename T>
DDF_KERNEL(kSumThreads)
sum_partials(View<T> grad_channel, const float* partials, int64_t batch, int64_t channels,
             int tiles) {
  DDF_SHARED(float, sums);
  const int64_t values = batch * channels * kFilterTaps;
  const int64_t value = block_index() * kLanes + thread_index() % kLanes;
  float sum = 0.f;
  if (value < values) {
    for (int tile = thread_index() / kLanes; tile < tiles; tile += kSumWarps) {
      sum += load(partials + tile * values + value);
    }
  }
  sums[thread_index()] = sum;
  for (int half = kSumThreads / 2; half >= kLanes; half /= 2) {
    sync_threads();
    if (thread_index() < half) sums[thread_index()] += sums[thread_index() + half];
  }
  if (thread_index() < kLanes && value < values) {
    const int tap = value % kFilterTaps;
    const int64_t plane = value / kFilterTaps;
    store(grad_channel.at(plane / channels, plane % channels, tap / 3, tap % 3),
          sums[thread_index()]);
  }
}

}  // namespace ddf::cuda
