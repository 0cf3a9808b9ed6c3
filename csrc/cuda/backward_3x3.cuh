// All three gradients in one pass over grad and features, for 3 x 3 windows of stride and dilation
// 1 over rows that are contiguous in memory (NCHW).
// A thread has pixels of the features; the outputs that read them are their neighbours in grad. A
// block has a tile of pixels for `lanes` neighbouring threads; its warps, and parts of warps,
// divide the channels. grad_spatial is summed in registers over the channels of a thread, then over
// the block; grad_channel over the lanes, then over the tiles by reduce_partials.
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
// Floats of shared memory from a sum of grad_spatial of all threads to the next, and for those of a
// row of pixels.
constexpr int kBackwardSumStride = kBackwardThreads + 8;
constexpr int kBackwardSumFloats = kBackwardTaps * kBackwardColumns * kBackwardSumStride;

// A thread copies what it reads of a channel to shared memory while it computes the one before, so
// that no load is waited for: vectors of the rows of grad and features, then the elements on the
// left and on the right of those of grad, each with room for two channels.
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
constexpr int backward_block_channels(bool copies) {
  return (kBackwardMostFloats - (copies ? 2 * kBackwardCopied<T> : 0)) / kBackwardTapStride;
}

// Stores `sum`, of pixel (y, x) and the outputs that read it by `tap`, as the gradient of the tap.
template <typename T>
DDF_DEVICE void store_sum_of_pixel(const PartialSums<T>& partials, const Geometry& g,
                                   int channel_block, int64_t batch, int64_t group, int tap, int y,
                                   int x, float sum) {
  const int height = g.height;
  const int width = g.width;
  const auto is_inside = [&](int row, int column) {
    return row >= 0 && row < height && column >= 0 && column < width;
  };
  const int64_t plane = group * kBackwardTaps + tap;
  const int down = tap / 3 - 1;
  const int right = tap % 3 - 1;
  if (is_inside(y - down, x - right)) {
    partials.store_spatial(g, channel_block, batch, plane, y - down, x - right, sum);
  }
  // A tap of the output at this pixel that lies outside the features has no gradient.
  if (!is_inside(y + down, x + right)) {
    partials.store_spatial(g, channel_block, batch, plane, y, x, 0.f);
  }
}

// a.result is grad_features. Vector as for forward_3x3. Copies: the width and the addresses of the
// rows, in elements, are multiples of 2. lanes: 8, 16 or 32, of which a warp divides all channel
// blocks into equal parts.
template <typename T, typename Combine, bool Vector, bool Copies>
DDF_KERNEL(kBackwardThreads, 2)
backward_3x3(Arguments<T> a, PartialSums<T> partials, int lanes) {
  constexpr int kTaps = kBackwardTaps;
  constexpr int kRows = kBackwardRows;
  constexpr int kColumns = kBackwardColumns;
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  const int height = g.height;
  const int width = g.width;
  const int lane = thread_index() % lanes;
  const int warp = thread_index() / kLanes;
  const auto [tile, channel_block, group, batch] =
      place_of_block(partials.tiles, partials.channel_blocks, g);
  const int quads_per_row = (width + kColumns - 1) / kColumns;
  const int quad = tile * lanes + lane;
  const int top = quad / quads_per_row * kRows;
  const int left = quad % quads_per_row * kColumns;
  const bool active = top < height;

  // A bit for each output of the window, because there are more of them than predicates.
  unsigned outputs = 0;
  DDF_UNROLL
  for (int y = 0; y < kRows + 2; ++y) {
    DDF_UNROLL
    for (int x = 0; x < kColumns + 2; ++x) {
      const bool row_inside = active && (y == 1 || (top + y >= 1 && top + y <= height));
      const bool surely = x == 1 || (Vector && x >= 1 && x <= kColumns);
      const bool column_inside = surely || (left + x >= 1 && left + x <= width);
      if (row_inside && column_inside) outputs |= 1u << (y * (kColumns + 2) + x);
    }
  }
  const auto is_inside = [&](int y, int x) {
    // The first of those that are inside together.
    if (x > 0 && x <= kColumns && (Vector || Copies)) {
      x -= (x - 1) % (Vector ? kColumns : 2);
    }
    return (outputs >> (y * (kColumns + 2) + x) & 1) != 0;
  };

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
        if (a.spatial_filter.data != nullptr && is_inside(y, x)) {
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
  const int block_channels = end - first;
  // With fewer lanes than a warp has, each of its parts has as many channels.
  const int channels = block_channels * lanes / kLanes;
  const int part_channel = thread_index() % kLanes / lanes * channels;
  const auto* const taps_of_part = shared + part_channel * kBackwardTapStride;
  const int64_t own = channel + part_channel + warp;
  const T* gradient = a.grad.at(batch, own, top - 1, left - 1);
  const T* features = a.features.at(batch, own, top, left);
  T* target = a.result.at(batch, own, top, left);
  float* partial = partials.channel_at(g, tile, batch, own);
  for (int i = thread_index(); i < block_channels * kTaps; i += kBackwardThreads) {
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
  const auto copy_vector = [&](auto* to, const T* from, int y) {
    if (Vector) {
      if (is_inside(y, 1)) copy_to_shared<kColumns>(to, from);
    } else {
      DDF_UNROLL
      for (int x = 0; x < kColumns; x += 2) {
        if (is_inside(y, x + 1)) copy_to_shared<2>(to + x / kHalo, from + x);
      }
    }
  };
  const auto copy_next = [&](int to) {
    DDF_UNROLL
    for (int y = 0; y < kRows + 2; ++y) {
      const T* const line = gradient + y * a.grad.row_stride;
      copy_vector(vector_at(y) + to, line + 1, y);
      if (is_inside(y, 0)) {
        copy_to_shared<kHalo>(halo_at(y, 0) + to, line + 1 - kHalo);
      }
      if (is_inside(y, kColumns + 1)) {
        copy_to_shared<kHalo>(halo_at(y, 1) + to, line + kColumns + 1);
      }
      if (y < kRows) {
        copy_vector(vector_at(kRows + 2 + y) + to, features + y * a.features.row_stride, y + 1);
      }
    }
    gradient += kBackwardWarps * a.grad.channel_stride;
    features += kBackwardWarps * a.features.channel_stride;
  };
  if (Copies) {
    // Of what is outside the image, nothing is copied.
    DDF_UNROLL_NOT
    for (int i = thread_index(); i < 2 * kBackwardCopied<T>; i += kBackwardThreads) copied[i] = 0.f;
  }
  sync_threads();
  if (Copies) {
    if (warp < channels) copy_next(0);
    end_copies();
  }
  DDF_UNROLL_NOT
  for (int i = warp; i < channels; i += kBackwardWarps) {
    if (Copies) {
      if (i + kBackwardWarps < channels) copy_next(other);
      end_copies();
      await_copies<1>();
    }
    float channel_sums[kTaps] = {};
    float values[kRows][kColumns] = {};
    float sums[kRows][kColumns] = {};
    // By rows of the window, so that a row takes registers only from its first use to its last.
    DDF_UNROLL
    for (int y = 0; y < kRows + 2; ++y) {
      float window[kColumns + 2] = {};
      const T* const grad_line = gradient + y * a.grad.row_stride;
      const T* const line = features + y * a.features.row_stride;
      if (Copies) {
        window[0] = load_copied<T>(halo_at(y, 0), kHalo - 1);
        load_copied4<T>(&window[1], vector_at(y));
        window[kColumns + 1] = load_copied<T>(halo_at(y, 1), 0);
        if (y < kRows) load_copied4<T>(values[y], vector_at(kRows + 2 + y));
      } else {
        // Without conditions on rows, it would spill registers.
        DDF_UNROLL
        for (int x = 0; is_inside(y, 1) && x < kColumns + 2; ++x) {
          window[x] = load_if(grad_line + x, is_inside(y, x));
        }
        if (y < kRows && is_inside(y + 1, 1)) {
          DDF_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            values[y][column] = load_if(line + column, is_inside(y + 1, column + 1));
          }
        }
      }
      DDF_UNROLL
      for (int row = 0; row < kRows; ++row) {
        const int tap_row = row + 2 - y;
        if (tap_row < 0 || tap_row > 2) continue;
        float taps[4];
        load_shared4(taps, taps_of_part + i * kBackwardTapStride + 4 * tap_row);
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
            // Outputs outside the image have no filter: 0 * Inf must not be added. Of the output
            // and the pixel, the later row and column are inside if both are.
            const int last_row = y > row + 1 || row == 0 ? y : row + 1;
            const int last_column = x > column + 1 || column == 0 ? x : column + 1;
            if (is_inside(last_row, last_column)) {
              sums[row][column] += Combine::weight(per_channel, spatial) * output;
              channel_sums[tap] += Combine::grad_channel(term, per_channel, spatial);
            }
          }
        }
      }
      if (y >= 2 && is_inside(y - 1, 1)) {
        T* const line = target + (y - 2) * a.result.row_stride;
        if (Vector) {
          store4(line, sums[y - 2]);
        } else {
          DDF_UNROLL
          for (int column = 0; column < kColumns; ++column) {
            if (is_inside(y - 1, column + 1)) store(line + column, sums[y - 2][column]);
          }
        }
      }
    }
    if (partials.channel_partials != nullptr) {
      sum_over_lanes(channel_sums, thread_index(), lanes);
      if (lane < kTaps - 1) store(partial + lane, channel_sums[0]);
      if (lane == 0) store(partial + kTaps - 1, channel_sums[kTaps - 1]);
    }
    if (Copies) {
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
  if (Copies) await_copies<0>();

  if (!partials.needs_spatial()) return;
  DDF_UNROLL
  for (int row = 0; row < kRows; ++row) {
    // What was in the shared memory is not used any more.
    sync_threads();
    DDF_UNROLL
    for (int i = 0; i < kTaps * kColumns; ++i) {
      shared[i * kBackwardSumStride + thread_index()] =
          spatial_sums[(i / kColumns * kRows + row) * kColumns + i % kColumns];
    }
    // The sums of all threads.
    sync_threads();
    DDF_UNROLL_NOT
    for (int i = thread_index() / lanes; i < kTaps * kColumns; i += kBackwardThreads / lanes) {
      const int x = left + i % kColumns;
      if (top + row >= height || x >= width) continue;
      float sum = 0.f;
      for (int of = lane; of < kBackwardThreads; of += lanes) {
        sum += shared[i * kBackwardSumStride + of];
      }
      store_sum_of_pixel(partials, g, channel_block, batch, group, i / kColumns, top + row, x, sum);
    }
  }
}

}  // namespace ddf::cuda
