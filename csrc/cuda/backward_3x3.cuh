// All three gradients in one pass over grad and features, for 3 x 3 windows of stride and dilation
// 1 over rows that are contiguous in memory (NCHW).
// A thread has pixels of the features; the outputs that read them are their neighbours in grad. A
// block has a tile of pixels, and its warps divide the channels. grad_spatial is summed in
// registers over the channels of a warp, then over the warps; grad_channel over the lanes of a
// warp, then over the tiles by reduce_partials.
#pragma once
#include "grad_filters.cuh"

namespace ddf::cuda {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = kBackwardWarps * kLanes;
constexpr int kBackwardRows = 2;
constexpr int kBackwardColumns = 4;
constexpr int kBackwardTaps = 9;
// Floats of shared memory from one channel filter to the next: each row of taps is 16-byte aligned.
constexpr int kBackwardTapStride = 12;
// Floats of shared memory for the sums of grad_spatial of half of the warps.
constexpr int kBackwardSumFloats =
    kBackwardWarps / 2 * kBackwardTaps * kBackwardRows * kBackwardColumns * kLanes;

// With aligned rows, a thread copies what it reads of a channel to shared memory while it computes
// the one before, so that no load is waited for: the vectors of the rows of grad and features, then
// the elements on the left and on the right of those of grad, each with room for two channels.
constexpr int kBackwardVectors = 2 * kBackwardRows + 2;
constexpr int kBackwardHalos = 2 * (kBackwardRows + 2);
// Floats of shared memory for one channel.
template <typename T>
constexpr int kBackwardCopied =
    (kBackwardVectors * static_cast<int>(sizeof(T)) + kBackwardHalos) * kBackwardThreads;

// Floats of the 48 KiB of shared memory that every launch may use.
constexpr int kBackwardMostFloats = 48 * 1024 / 4;

// Channels of a block, whose filters take the rest of the shared memory.
template <typename T>
constexpr int backward_block_channels(bool vector) {
  return (kBackwardMostFloats - (vector ? 2 * kBackwardCopied<T> : 0)) / kBackwardTapStride;
}

// a.result is grad_features. Vector as for forward_3x3.
template <typename T, typename Combine, bool Vector>
DDF_KERNEL(kBackwardThreads, 2)
backward_3x3(Arguments<T> a, PartialSums<T> partials) {
  constexpr int kTaps = kBackwardTaps;
  constexpr int kRows = kBackwardRows;
  constexpr int kColumns = kBackwardColumns;
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int height = g.height;
  const int width = g.width;
  const int lane = thread_index() % kLanes;
  const int warp = thread_index() / kLanes;
  const auto [tile, channel_block, group, batch] =
      place_of_block(partials.tiles, partials.channel_blocks, g);
  const int quads_per_row = (width + kColumns - 1) / kColumns;
  const int quad = tile * kLanes + lane;
  const int top = quad / quads_per_row * kRows;
  const int left = quad % quads_per_row * kColumns;
  const bool active = top < height;

  bool row_inside[kRows + 2], column_inside[kColumns + 2];
  DDF_UNROLL
  for (int y = 0; y < kRows + 2; ++y) {
    row_inside[y] = active && (y == 1 || (top + y >= 1 && top + y <= height));
  }
  DDF_UNROLL
  for (int x = 0; x < kColumns + 2; ++x) {
    const bool surely = x == 1 || (Vector && x >= 1 && x <= kColumns);
    column_inside[x] = surely || (left + x >= 1 && left + x <= width);
  }

  float spatial_taps[kTaps][kRows][kColumns];
  float spatial_sums[kTaps * kRows * kColumns];
  DDF_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    DDF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      DDF_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const int y = row + 2 - tap / 3;
        const int x = column + 2 - tap % 3;
        spatial_sums[(tap * kRows + row) * kColumns + column] = 0.f;
        spatial_taps[tap][row][column] = Combine::kNeutral;
        if (a.spatial_filter.data != nullptr && row_inside[y] && column_inside[x]) {
          spatial_taps[tap][row][column] =
              load(a.spatial_filter.at(batch, group * kTaps + tap, top + y - 1, left + x - 1));
        }
      }
    }
  }

  const int first = channel_block * partials.block_channels;
  const int64_t block_end = static_cast<int64_t>(first) + partials.block_channels;
  const int end = block_end < g.group_channels ? block_end : g.group_channels;
  const int64_t channel = group * g.group_channels + first;
  const T* gradient = a.grad.at(batch, channel + warp, top - 1, left - 1);
  const T* features = a.features.at(batch, channel + warp, top, left);
  T* target = a.result.at(batch, channel + warp, top, left);
  float* partial = partials.channel_at(g, tile, batch, channel + warp);
  const int channels = end - first;
  for (int i = thread_index(); i < channels * kTaps; i += kBackwardThreads) {
    const int tap = i % kTaps;
    shared[i / kTaps * kBackwardTapStride + tap / 3 * 4 + tap % 3] =
        a.channel_filter.data == nullptr
            ? Combine::kNeutral
            : load(a.channel_filter.at(batch, channel + i / kTaps, tap / 3, tap % 3));
  }

  // Floats of a vector; two elements of 16 bits are copied for one beside a vector.
  constexpr int kFloats = sizeof(T), kHalo = 4 / sizeof(T);
  auto* const copied = shared + kBackwardTapStride * partials.block_channels;
  auto* vectors = copied + thread_index() * kFloats;
  auto* halos = copied + kBackwardVectors * kBackwardThreads * kFloats + thread_index();
  // From the channel that is computed to the room for the next, or back.
  int other = kBackwardCopied<T>;
  const auto vector_at = [&](int y) { return vectors + y * kBackwardThreads * kFloats; };
  const auto halo_at = [&](int y, int right) { return halos + (2 * y + right) * kBackwardThreads; };
  const auto copy_next = [&](int to) {
    DDF_UNROLL
    for (int y = 0; y < kRows + 2; ++y) {
      const T* const line = gradient + y * a.grad.row_stride;
      if (row_inside[y]) copy_to_shared<kColumns>(vector_at(y) + to, line + 1);
      if (row_inside[y] && column_inside[0]) {
        copy_to_shared<kHalo>(halo_at(y, 0) + to, line + 1 - kHalo);
      }
      if (row_inside[y] && column_inside[kColumns + 1]) {
        copy_to_shared<kHalo>(halo_at(y, 1) + to, line + kColumns + 1);
      }
      if (y < kRows && row_inside[y + 1]) {
        copy_to_shared<kColumns>(vector_at(kRows + 2 + y) + to,
                                 features + y * a.features.row_stride);
      }
    }
    gradient += kBackwardWarps * a.grad.channel_stride;
    features += kBackwardWarps * a.features.channel_stride;
  };
  if (Vector) {
    // Of what is outside the image, nothing is copied.
    DDF_UNROLL_NOT
    for (int i = thread_index(); i < 2 * kBackwardCopied<T>; i += kBackwardThreads) copied[i] = 0.f;
  }
  sync_threads();
  if (Vector) {
    if (warp < channels) copy_next(0);
    end_copies();
  }
  DDF_UNROLL_NOT
  for (int i = warp; i < channels; i += kBackwardWarps) {
    if (Vector) {
      if (i + kBackwardWarps < channels) copy_next(other);
      end_copies();
      await_copies<1>();
    }
    float values[kRows][kColumns] = {};
    float channel_sums[kTaps] = {};
    float sums[kRows][kColumns] = {};
    // By rows of the window, so that a row takes registers only from its first use to its last.
    DDF_UNROLL
    for (int y = 0; y < kRows + 2; ++y) {
      float window[kColumns + 2] = {};
      const T* const grad_line = gradient + y * a.grad.row_stride;
      const T* const line = features + y * a.features.row_stride;
      if (Vector) {
        window[0] = load_copied<T>(halo_at(y, 0), kHalo - 1);
        load_copied4<T>(&window[1], vector_at(y));
        window[kColumns + 1] = load_copied<T>(halo_at(y, 1), 0);
        if (y < kRows) load_copied4<T>(values[y], vector_at(kRows + 2 + y));
      } else {
        // Without conditions on rows, it would spill registers.
        DDF_UNROLL
        for (int x = 0; row_inside[y] && x < kColumns + 2; ++x) {
          if (column_inside[x]) window[x] = load(grad_line + x);
        }
        if (y < kRows && row_inside[y + 1]) {
          DDF_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            if (column_inside[column + 1]) values[y][column] = load(line + column);
          }
        }
      }
      DDF_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const int tap_row = row + 2 - y;
        if (tap_row < 0 || tap_row > 2) continue;
        float taps[4];
        load_shared4(taps, shared + i * kBackwardTapStride + 4 * tap_row);
        DDF_UNROLL
        for (int tap = 3 * tap_row; tap < 3 * tap_row + 3; ++tap) {
          const float per_channel = taps[tap % 3];
          DDF_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            const int x = column + 2 - tap % 3;
            const float output = window[x];
            const float spatial = spatial_taps[tap][row][column];
            const float term = values[row][column] * output;
            spatial_sums[(tap * kRows + row) * kColumns + column] +=
                Combine::grad_spatial(term, per_channel, spatial);
            // Pixels outside the image have no filter: 0 * Inf must not be added.
            if (row_inside[y] && column_inside[x]) {
              sums[row][column] += Combine::weight(per_channel, spatial) * output;
              if (Vector || column_inside[column + 1]) {
                channel_sums[tap] += Combine::grad_channel(term, per_channel, spatial);
              }
            }
          }
        }
      }
      if (y >= 2 && row_inside[y - 1]) {
        T* const line = target + (y - 2) * a.result.row_stride;
        if (Vector) {
          store4(line, sums[y - 2]);
        } else {
          DDF_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            if (column_inside[column + 1]) store(line + column, sums[y - 2][column]);
          }
        }
      }
    }
    if (partials.channel_partials != nullptr) {
      sum_over_lanes(channel_sums, lane, kLanes);
      if (lane < kTaps - 1) store(partial + lane, channel_sums[0]);
      if (lane == kTaps - 1) store(partial + lane, channel_sums[kTaps - 1]);
    }
    if (Vector) {
      vectors += other;
      halos += other;
      other = -other;
    } else {
      gradient += kBackwardWarps * a.grad.channel_stride;
      features += kBackwardWarps * a.features.channel_stride;
    }
    target += kBackwardWarps * a.result.channel_stride;
    partial += kBackwardWarps * kTaps;
  }
  if (Vector) await_copies<0>();

  if (!partials.needs_spatial()) return;
  sum_over_warps<kBackwardWarps>(spatial_sums, shared, warp, lane);
  if (warp != 0) return;
  DDF_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    DDF_UNROLL
    for (int row = 0; row < kRows; ++row) {
      DDF_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        if (!row_inside[row + 1] || !column_inside[column + 1]) continue;
        const int64_t plane = group * kTaps + tap;
        // The output that reads the pixel by this tap.
        const int y = row + 2 - tap / 3;
        const int x = column + 2 - tap % 3;
        if (row_inside[y] && column_inside[x]) {
          partials.store_spatial(g, channel_block, batch, plane, top + y - 1, left + x - 1,
                                 spatial_sums[(tap * kRows + row) * kColumns + column]);
        }
        // A tap of the output at this pixel that lies outside the features has no gradient.
        const int under_y = row + tap / 3;
        const int under_x = column + tap % 3;
        if (!row_inside[under_y] || !column_inside[under_x]) {
          partials.store_spatial(g, channel_block, batch, plane, top + row, left + column, 0.f);
        }
      }
    }
  }
}

}  // namespace ddf::cuda
