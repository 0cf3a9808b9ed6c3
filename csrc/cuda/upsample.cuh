// Kernels of ddf_up that compute all subpixels together, and their launches. Other calls run the
// kernels of ddf for each subpixel, on strided views.
#pragma once
#include <algorithm>

#include "generic.cuh"

namespace ddf::cuda {

template <typename T>
View<T> moved(View<T> view, int64_t elements) {
  if (view.data != nullptr) view.data += elements;
  return view;
}

// The pixels of subpixel r of an output.
template <typename T>
View<T> subpixel_of(View<T> output, int64_t scale, int64_t r) {
  output = moved(output, r / scale * output.row_stride + r % scale * output.column_stride);
  output.row_stride *= scale;
  output.column_stride *= scale;
  return output;
}

// The call of ddf that computes subpixel r; `a` has the filters of the first subpixel.
template <typename T>
Arguments<T> subpixel_of(Arguments<T> a, const SubpixelStrides& strides, int64_t r) {
  const int64_t scale = a.geometry.scale;
  a.geometry.scale = 1;
  a.grad = subpixel_of(a.grad, scale, r);
  a.result = subpixel_of(a.result, scale, r);
  a.channel_filter = moved(a.channel_filter, r * strides.channel_filter);
  a.spatial_filter = moved(a.spatial_filter, r * strides.spatial_filter);
  return a;
}

// grad_features, one value per thread, from all subpixels of the output pixels that read it.
template <typename T>
DDF_KERNEL(kGenericThreads, 4)
upsample_grad_features_generic(Arguments<T> a, Slice slice, SubpixelStrides strides) {
  const Position at = position_in(slice);
  if (!at.inside) return;
  const int kernel = a.geometry.kernel, dilation = a.geometry.dilation;
  const int height = a.geometry.height, width = a.geometry.width;
  const int scale = a.geometry.scale;
  const int padding = dilation * (kernel / 2);
  const int first_plane =
      at.channel / static_cast<int>(a.geometry.group_channels) * kernel * kernel;
  Accumulate<T> sum = 0;
  for (int subpixel = 0; subpixel < scale * scale; ++subpixel) {
    for (int tap_row = 0; tap_row < kernel; ++tap_row) {
      const int row = output_under(at.row, tap_row, padding, dilation, 1, height);
      if (row < 0) continue;
      for (int tap_column = 0; tap_column < kernel; ++tap_column) {
        const int column = output_under(at.column, tap_column, padding, dilation, 1, width);
        if (column < 0) continue;
        const int plane = first_plane + tap_row * kernel + tap_column;
        sum += load(a.grad.at(at.batch, at.channel, row * scale + subpixel / scale,
                              column * scale + subpixel % scale)) *
               filter_at(a, at.batch, at.channel, plane, tap_row, tap_column, row, column);
      }
    }
    if (a.channel_filter.data != nullptr) a.channel_filter.data += strides.channel_filter;
    if (a.spatial_filter.data != nullptr) a.spatial_filter.data += strides.spatial_filter;
  }
  store(a.result.at(at.batch, at.channel, at.row, at.column), sum);
}

constexpr int kUpsampleThreads = 128;
// Channels of a block, whose filters are in shared memory.
constexpr int kUpsampleBlockChannels = 32;
constexpr int kUpsampleTaps = 36;  // of 3 x 3 windows of four subpixels

// scale 2, 3 x 3 windows, contiguous rows: a thread has one pixel of the features and computes its
// four subpixels for each channel of the block from one load of the window. Zeros outside the image
// are multiplied and added as in the reference.
template <typename T, typename Combine>
DDF_KERNEL(kUpsampleThreads, 4)
upsample_3x3(Arguments<T> a, SubpixelStrides strides, int pixel_blocks, int channel_blocks) {
  DDF_SHARED(float, taps);
  const int height = a.geometry.height, width = a.geometry.width;
  const int group_channels = a.geometry.group_channels;
  const auto [channel_block, pixel_block, group, batch] =
      place_of_block(channel_blocks, pixel_blocks, a.geometry);
  const int pixel = pixel_block * kUpsampleThreads + thread_index();
  const int64_t first = group * group_channels + channel_block * kUpsampleBlockChannels;
  const int count = group_channels - channel_block * kUpsampleBlockChannels < kUpsampleBlockChannels
                        ? group_channels - channel_block * kUpsampleBlockChannels
                        : kUpsampleBlockChannels;

  for (int i = thread_index(); i < count * kUpsampleTaps; i += kUpsampleThreads) {
    const int subpixel = i % kUpsampleTaps / 9, tap = i % 9;
    taps[i] = a.channel_filter.data == nullptr
                  ? Combine::kNeutral
                  : load(a.channel_filter.at(batch, first + i / kUpsampleTaps, tap / 3, tap % 3) +
                         subpixel * strides.channel_filter);
  }
  sync_threads();
  if (pixel >= height * width) return;
  const int row = pixel / width, column = pixel % width;

  float spatial[kUpsampleTaps];
  DDF_UNROLL
  for (int i = 0; i < kUpsampleTaps; ++i) {
    spatial[i] = a.spatial_filter.data == nullptr
                     ? Combine::kNeutral
                     : load(a.spatial_filter.at(batch, group * 9 + i % 9, row, column) +
                            i / 9 * strides.spatial_filter);
  }
  const T* from = a.features.at(batch, first, row, column);
  T* to = a.result.at(batch, first, 2 * row, 2 * column);
  DDF_UNROLL_NOT
  for (int c = 0; c < count; ++c) {
    float window[9];
    DDF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int y = row + tap / 3 - 1, x = column + tap % 3 - 1;
      const bool inside = y >= 0 && y < height && x >= 0 && x < width;
      window[tap] =
          inside ? load(from + (tap / 3 - 1) * a.features.row_stride + (tap % 3 - 1)) : 0.0f;
    }
    float sums[4] = {};
    DDF_UNROLL
    for (int i = 0; i < kUpsampleTaps; i += 4) {
      float channel[4];
      load_shared4(channel, taps + c * kUpsampleTaps + i);
      DDF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float weight = Combine::weight(channel[j], spatial[i + j]);
        sums[(i + j) / 9] += window[(i + j) % 9] * weight;
      }
    }
    store2(to, sums);
    store2(to + a.result.row_stride, sums + 2);
    from += a.features.channel_stride;
    to += a.result.channel_stride;
  }
}

// Runs upsample_3x3 if it supports the call; returns whether it did.
template <typename T, typename Launch>
bool launch_upsample_3x3(const Arguments<T>& a, const SubpixelStrides& strides, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const View<T>& to = a.result;
    const bool in_pairs = reinterpret_cast<uintptr_t>(to.data) % (2 * sizeof(T)) == 0 &&
                          to.batch_stride % 2 == 0 && to.channel_stride % 2 == 0 &&
                          to.row_stride % 2 == 0 && to.column_stride == 1;
    if (g.kernel != 3 || g.scale != 2 || g.dilation != 1 || !in_pairs ||
        a.features.column_stride != 1) {
      return false;
    }
    const int64_t pixel_blocks = (g.height * g.width - 1) / kUpsampleThreads + 1;
    const int64_t channel_blocks = (g.group_channels - 1) / kUpsampleBlockChannels + 1;
    const int64_t blocks = g.batch * g.groups * channel_blocks * pixel_blocks;
    if (blocks > kMaxBlocks) return false;
    const int channels =
        static_cast<int>(std::min<int64_t>(kUpsampleBlockChannels, g.group_channels));
    const auto kernel = with_combine(
        a.combine, [](auto combine) { return DDF_HANDLE(upsample_3x3<T, decltype(combine)>); });
    launch("ddf_up forward, 3x3", kernel, blocks, kUpsampleThreads,
           sizeof(float) * kUpsampleTaps * channels, a, strides, static_cast<int>(pixel_blocks),
           static_cast<int>(channel_blocks));
    return true;
  }
}

// Calls run(call, r) for each subpixel r.
template <typename T, typename Run>
void for_each_subpixel(const Arguments<T>& a, const SubpixelStrides& strides, Run&& run) {
  for (int64_t r = 0; r < a.geometry.subpixels(); ++r) run(subpixel_of(a, strides, r), r);
}

// The filter gradients of subpixel r; `to` has those of the first subpixel.
template <typename T>
Gradients<T> grad_filters_of(const Gradients<T>& to, const SubpixelStrides& strides, int64_t r) {
  return {View<T>{}, moved(to.channel_filter, r * strides.channel_filter),
          moved(to.spatial_filter, r * strides.spatial_filter)};
}

}  // namespace ddf::cuda
