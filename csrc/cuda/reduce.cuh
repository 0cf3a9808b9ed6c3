// What the kernels of the filters' gradients share: sums over lanes, and sums that several blocks
// make in parts. Parts are added in a fixed order, without atomics, so that results are repeatable.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kLanes = 32;
constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kLanes;

// Where the filters' gradients go; null what is not wanted.
template <typename T>
struct FilterSums {
  float* channel_parts;  // [tiles, B, C, k * k]
  View<T> grad_spatial;  // the result itself, when the channels of a group are in one part,
  float* spatial_parts;  // or else [splits, B, g * k * k, Ho, Wo]
  int tiles;             // of an image; each is the work of a block
  int splits, slab;      // parts that a group's channels are split in, and channels of a part

  DDF_DEVICE bool wants_spatial() const {
    return grad_spatial.data != nullptr || spatial_parts != nullptr;
  }

  DDF_DEVICE float* channel_part(const Geometry& g, int64_t tile, int64_t batch,
                                 int64_t channel) const {
    return channel_parts + ((tile * g.batch + batch) * g.channels + channel) * g.kernel * g.kernel;
  }

  // A sum of grad_spatial's place, and those to its right: one of the two is null.
  struct Place {
    T* result;
    float* part;
    int64_t column_stride;

    DDF_DEVICE void store(float sum) const {
      if (part == nullptr) {
        cuda::store(result, sum);
      } else {
        cuda::store(part, sum);
      }
    }
    DDF_DEVICE void advance() {
      if (part == nullptr) {
        result += column_stride;
      } else {
        ++part;
      }
    }
  };

  DDF_DEVICE Place spatial_at(const Geometry& g, int64_t split, int64_t batch, int64_t plane,
                              int row, int column) const {
    if (spatial_parts == nullptr) {
      return {grad_spatial.at(batch, plane, row, column), nullptr, grad_spatial.column_stride};
    }
    const int64_t planes = g.groups * g.kernel * g.kernel;
    const int64_t line = ((split * g.batch + batch) * planes + plane) * g.out_height + row;
    return {nullptr, spatial_parts + line * g.out_width + column, 1};
  }

  DDF_DEVICE void store_spatial(const Geometry& g, int64_t split, int64_t batch, int64_t plane,
                                int row, int column, float sum) const {
    spatial_at(g, split, batch, plane, row, column).store(sum);
  }
};

// How many of N values sum_over_lanes spreads over the lanes: the others it sums in place.
constexpr int spread_of(int n) { return n >= 8 ? 8 : 4; }

// Sums N values (4, 5, 8 or 9) over `lanes` neighbouring lanes, a power of two of at least 8. Lane
// i of the first spread_of(N) gets the sum of value i in values[0]; all get that of a last odd
// value in values[N - 1]. Half of the values change hands at each step, so that over a warp 9 sums
// cost 14 shuffles, not 45.
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

// The sums of `count` parts, each laid out as the contiguous result: a warp of neighbouring values,
// and the parts shared among the warps of a block.
template <typename T>
DDF_KERNEL(kSumThreads)
sum_parts(View<T> result, const float* parts, int64_t values, int channels, int rows, int columns,
          int count) {
  DDF_SHARED(float, sums);
  const int64_t value = block_index() * kLanes + thread_index() % kLanes;
  float sum = 0.f;
  if (value < values) {
    for (int part = thread_index() / kLanes; part < count; part += kSumWarps) {
      sum += load(parts + part * values + value);
    }
  }
  sums[thread_index()] = sum;
  for (int half = kSumThreads / 2; half >= kLanes; half /= 2) {
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
