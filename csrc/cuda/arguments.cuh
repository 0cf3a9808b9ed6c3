// Arguments of the kernels.
#pragma once
#include <cstdint>
#include <limits>

#include "combine.h"
#include "geometry.h"
#include "platform.cuh"

namespace ddf::cuda {

// Compile-time arguments of generic lambdas.
using True = std::true_type;
using False = std::false_type;

// CUDA's limit for one launch.
constexpr int64_t kMaxBlocks = INT32_MAX;

// Rows, columns and the pixels of one channel are 32-bit, with room for halos; so is the index of
// an element within a launch. Other offsets are 64-bit.
constexpr int64_t kMaxPixels = INT32_MAX / 4;
constexpr int64_t kMaxElements32 = INT32_MAX;

// Whether a call, whose geometry is bounded, can be split into such launches.
inline bool is_within_launches(const Geometry& g) {
  return g.batch <= kMaxElements32 && g.channels <= kMaxPixels && g.stride <= kMaxPixels &&
         is_product_within(kMaxPixels, g.height, g.width) &&
         is_product_within(kMaxPixels, g.scale, g.height) &&
         is_product_within(kMaxPixels, g.scale, g.width) &&
         is_product_within(kMaxPixels, g.scale, g.scale) &&
         is_product_within(kMaxPixels, g.kernel, g.dilation) &&
         is_product_within(kMaxElements32, g.channels, g.width) &&
         is_product_within(kMaxElements32, g.groups, g.kernel, g.kernel, g.out_width);
}

// The accumulation type: float for 16-bit types.
template <typename T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <typename T>
using Accumulate = typename AccumulateType<T>::type;

// A tensor of four dimensions with strides in elements; data is null if the filter is None.
template <typename T>
struct View {
  T* data;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  DDF_DEVICE T* at(int64_t batch, int64_t channel, int64_t row, int64_t column) const {
    return data + batch * batch_stride + channel * channel_stride + row * row_stride +
           column * column_stride;
  }
};

// From the filters of a subpixel of ddf_up to those of the next, in elements.
struct SubpixelStrides {
  int64_t channel_filter, spatial_filter;
};

// Prologue (FilterNorm of the filters) and epilogue (bias, ReLU) of ddf_pack; by default none.
template <typename A>
struct PackOptions {
  A channel_scale = 1, spatial_scale = 1, eps = 0;
  const A* channel_std = nullptr;  // [C * k * k]; null if absent
  const A* bias = nullptr;         // [C], added to the output; null if absent
  // Lower bound of the output: 0 for ReLU, otherwise -infinity.
  A output_min = -std::numeric_limits<A>::infinity();

  // The bias of a channel, with which its sums start.
  DDF_DEVICE A bias_of(int64_t channel) const {
    return bias == nullptr ? A(0) : load(bias + channel);
  }
  // NaNs are kept.
  DDF_DEVICE A clamp_min(A sum) const { return sum < output_min ? output_min : sum; }
};

template <typename T>
struct Arguments {
  Geometry geometry;
  CombineMode combine;
  View<const T> grad;  // of the output; null in the forward pass
  View<const T> features;
  View<const T> channel_filter;
  View<const T> spatial_filter;
  View<T> result;  // the one tensor that the kernel writes
  PackOptions<Accumulate<T>> pack;
};

// What a block of the grid batch x groups x `seconds` x `firsts` computes.
struct BlockPlace {
  int first, second;
  int64_t group, batch;
};

DDF_DEVICE BlockPlace place_of_block(int firsts, int seconds, const Geometry& g) {
  // At most INT32_MAX; divisions of 64 bits are slow.
  unsigned block = block_index();
  BlockPlace place;
  place.first = block % firsts;
  block /= firsts;
  place.second = block % seconds;
  block /= seconds;
  const unsigned groups = g.groups;
  place.group = block % groups, place.batch = block / groups;
  return place;
}

// The gradients of a call; data is null where a gradient is not needed.
template <typename T>
struct Gradients {
  View<T> features, channel_filter, spatial_filter;
};

}  // namespace ddf::cuda
