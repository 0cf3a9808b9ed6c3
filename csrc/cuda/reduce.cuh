// Reductions of the filters' gradients: over the lanes of a warp, and of the partial sums of
// several blocks. Partial sums are added in a fixed order, without atomics, so that results are
// repeatable.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kLanes = 32;
constexpr int kReduceWarps = 8;
constexpr int kReduceThreads = kReduceWarps * kLanes;

// Partial sums of the filters' gradients, which reduce_partials adds up. Null: not needed.
template <typename T>
struct PartialSums {
  float* channel_partials;             // [tiles, B, C, k * k]
  View<T> grad_spatial;                // the gradient itself, where a group has one channel block;
  float* spatial_partials;             // otherwise [channel_blocks, B, g * k * k, Ho, Wo]
  int tiles;                           // of an image; each is the work of a block
  int channel_blocks, block_channels;  // channel blocks of a group; channels of one

  DDF_DEVICE bool needs_spatial() const {
    return grad_spatial.data != nullptr || spatial_partials != nullptr;
  }

  DDF_DEVICE float* channel_at(const Geometry& g, int64_t tile, int64_t batch,
                               int64_t channel) const {
    return channel_partials +
           ((tile * g.batch + batch) * g.channels + channel) * g.kernel * g.kernel;
  }

  // Where a sum of grad_spatial is stored; one of the two pointers is null.
  struct Place {
    T* result;
    float* partial;
    int64_t column_stride;

    DDF_DEVICE void store(float sum) const {
      if (partial == nullptr) {
        cuda::store(result, sum);
      } else {
        cuda::store(partial, sum);
      }
    }
    DDF_DEVICE void advance() {
      if (partial == nullptr) {
        result += column_stride;
      } else {
        ++partial;
      }
    }
  };

  DDF_DEVICE Place spatial_at(const Geometry& g, int64_t channel_block, int64_t batch,
                              int64_t plane, int row, int column) const {
    if (spatial_partials == nullptr) {
      return {grad_spatial.at(batch, plane, row, column), nullptr, grad_spatial.column_stride};
    }
    const int64_t spatial_channels = g.groups * g.kernel * g.kernel;
    const int64_t line =
        ((channel_block * g.batch + batch) * spatial_channels + plane) * g.out_height + row;
    return {nullptr, spatial_partials + line * g.out_width + column, 1};
  }

  DDF_DEVICE void store_spatial(const Geometry& g, int64_t channel_block, int64_t batch,
                                int64_t plane, int row, int column, float sum) const {
    spatial_at(g, channel_block, batch, plane, row, column).store(sum);
  }
};

// Number of the N values that sum_over_lanes distributes over the lanes.
constexpr int spread_of(int n) { return n >= 8 ? 8 : 4; }

// Sums N values (4, 5, 8 or 9) over `lanes` neighbouring lanes, a power of two of at least 8. Lane
// i of the first spread_of(N) gets the sum of value i in values[0]; all lanes get the sum of a last
// odd value in values[N - 1]. Lanes exchange half of the values in each step (butterfly), so that 9
// sums over a warp take 14 shuffles, not 45.
template <int N>
DDF_DEVICE void sum_over_lanes(float (&values)[N], int lane, int lanes) {
  constexpr int kSpread = spread_of(N);
  static_assert(N == kSpread || N == kSpread + 1);
  DDF_UNROLL
  for (int kept = kSpread / 2; kept >= 1; kept /= 2) {
    const bool upper = (lane & kept) != 0;
    DDF_UNROLL
    for (int i = 0; i < kept; ++i) {
      const float sent = upper ? values[i] : values[i + kept];
      values[i] = (upper ? values[i + kept] : values[i]) + shuffle_xor(sent, kept);
    }
  }
  DDF_UNROLL
  for (int distance = 1; distance < kLanes; distance *= 2) {
    if (distance >= lanes) break;
    if (distance >= kSpread) values[0] += shuffle_xor(values[0], distance);
    if (N > kSpread) values[N - 1] += shuffle_xor(values[N - 1], distance);
  }
}

// Sums `count` partial sums for each value, [count][values] in the order of the contiguous result.
// Each warp takes neighbouring values; the partial sums are divided among the warps of a block.
template <typename T>
DDF_KERNEL(kReduceThreads)
reduce_partials(View<T> result, const float* partials, int64_t values, int channels, int rows,
                int columns, int count) {
  DDF_SHARED(float, sums);
  const int64_t value = block_index() * kLanes + thread_index() % kLanes;
  float sum = 0.f;
  if (value < values) {
    for (int index = thread_index() / kLanes; index < count; index += kReduceWarps) {
      sum += load(partials + index * values + value);
    }
  }
  sums[thread_index()] = sum;
  for (int half = kReduceThreads / 2; half >= kLanes; half /= 2) {
    sync_threads();
    if (thread_index() < half) sums[thread_index()] += sums[thread_index() + half];
  }
  if (thread_index() < kLanes && value < values) {
    const int64_t line = value / columns;
    const int64_t plane = line / rows;
    store(result.at(plane / channels, plane % channels, line % rows, value % columns),
          sums[thread_index()]);
  }
}

}  // namespace ddf::cuda
