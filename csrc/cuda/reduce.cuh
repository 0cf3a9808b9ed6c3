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

// Sums N values (4, 5, 8 or 9) over spread_of(N) neighbouring lanes, but for a last odd one. Lane i
// gets the sum of value i in values[0]. Lanes exchange half of the values in each step (butterfly).
template <int N>
DDF_DEVICE void spread_over_lanes(float (&values)[N], int lane) {
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
}

// Sums N values over `lanes` neighbouring lanes, a power of two of at least 8. Lane i of the first
// spread_of(N) gets the sum of value i in values[0]; all lanes get the sum of a last odd value in
// values[N - 1]. 9 sums over a warp take 14 shuffles, not 45.
template <int N>
DDF_DEVICE void sum_over_lanes(float (&values)[N], int lane, int lanes) {
  constexpr int kSpread = spread_of(N);
  spread_over_lanes(values, lane);
  DDF_UNROLL
  for (int distance = 1; distance < kLanes; distance *= 2) {
    // Sums of other lanes are zeros instead, for which there is no branch.
    const auto other = [&](float value) {
      const float received = shuffle_xor(value, distance);
      return distance < 8 || distance < lanes ? received : 0.f;
    };
    if (distance >= kSpread) values[0] += other(values[0]);
    if (N > kSpread) values[N - 1] += other(values[N - 1]);
  }
}

// `count` partial sums for each of `values` of a result, [count][values] in the order of the
// contiguous result.
template <typename T>
struct Reduction {
  View<T> result;
  const float* partials;
  int64_t values;
  int channels, rows, columns, count;
};

// Adds up the partial sums of two results, either of which may have no values. Each warp takes
// neighbouring values; the partial sums are divided among the warps of a block.
template <typename T>
DDF_KERNEL(kReduceThreads)
reduce_partials(Reduction<T> first, Reduction<T> second) {
  DDF_SHARED(float, sums);
  const int64_t first_blocks = (first.values + kLanes - 1) / kLanes;
  const bool is_first = block_index() < first_blocks;
  const int64_t block = is_first ? block_index() : block_index() - first_blocks;
  const int64_t value = block * kLanes + thread_index() % kLanes;
  const int64_t values = is_first ? first.values : second.values;
  const float* const partials = is_first ? first.partials : second.partials;
  const int count = is_first ? first.count : second.count;
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
  if (thread_index() >= kLanes || value >= values) return;
  const auto store_to = [&](const Reduction<T>& of) {
    const int64_t line = value / of.columns;
    const int64_t plane = line / of.rows;
    store(
        of.result.at(plane / of.channels, plane % of.channels, line % of.rows, value % of.columns),
        sums[thread_index()]);
  };
  if (is_first) {
    store_to(first);
  } else {
    store_to(second);
  }
}

}  // namespace ddf::cuda
