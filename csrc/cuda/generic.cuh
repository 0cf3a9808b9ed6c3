// Kernels for any kernel size, stride, dilation, groups and memory strides: one value per thread.
//
// Zeros outside the image are multiplied and added as in the reference, so that NaN and Inf in the
// filters have the same effect. Sums have a fixed order, so that results are repeatable.
#pragma once
#include <algorithm>

#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kGenericThreads = 256;
// Channels of a block of grad_channel_generic if they are adjacent in memory: a warp reads them
// together.
constexpr int kChannelLanes = 32;

// The slice of a tensor that one launch writes: small enough for 32-bit indices, whose divisions
// are cheap.
struct Slice {
  int first_batch, first_row;
  int batches, channels, rows, columns;
  bool channels_last;  // the order of the tensor's memory
};

struct Position {
  int batch, channel, row, column;
  bool inside;
};

// The element that a thread computes; neighbouring threads have neighbouring addresses.
DDF_DEVICE Position position_in(const Slice& slice) {
  unsigned index = static_cast<unsigned>(block_index()) * kGenericThreads + thread_index();
  Position at;
  if (slice.channels_last) {
    at.channel = index % slice.channels;
    index /= slice.channels;
  }
  at.column = index % slice.columns;
  index /= slice.columns;
  at.row = index % slice.rows + slice.first_row;
  index /= slice.rows;
  if (!slice.channels_last) {
    at.channel = index % slice.channels;
    index /= slice.channels;
  }
  at.inside = index < static_cast<unsigned>(slice.batches);
  at.batch = index + slice.first_batch;
  return at;
}

template <typename T>
DDF_DEVICE Accumulate<T> load_or_zero(const View<const T>& tensor, int batch, int channel, int row,
                                      int column, int rows, int columns) {
  if (row < 0 || row >= rows || column < 0 || column >= columns) return 0;
  return load(tensor.at(batch, channel, row, column));
}

// The filter of channel `channel` at tap (tap_row, tap_column) and output pixel (row, column);
// `plane` is the tap's channel of the spatial filter.
template <typename T>
DDF_DEVICE Accumulate<T> filter_at(const Arguments<T>& a, int batch, int channel, int plane,
                                   int tap_row, int tap_column, int row, int column) {
  if (a.spatial_filter.data == nullptr) {
    return load(a.channel_filter.at(batch, channel, tap_row, tap_column));
  }
  const Accumulate<T> spatial = load(a.spatial_filter.at(batch, plane, row, column));
  if (a.channel_filter.data == nullptr) return spatial;
  const Accumulate<T> per_channel = load(a.channel_filter.at(batch, channel, tap_row, tap_column));
  return with_combine(
      a.combine, [&](auto combine) { return decltype(combine)::weight(per_channel, spatial); });
}

// Whether the gradient of one filter depends on the filters: with one of them alone it does not.
template <typename T>
DDF_DEVICE bool grad_reads_filters(const Arguments<T>& a) {
  return a.channel_filter.data != nullptr && a.spatial_filter.data != nullptr &&
         with_combine(a.combine, [](auto combine) { return decltype(combine)::kGradReadsFilters; });
}

template <typename T>
DDF_KERNEL(kGenericThreads, 4)
forward_generic(Arguments<T> a, Slice slice) {
  const Position at = position_in(slice);
  if (!at.inside) return;
  const int kernel = a.geometry.kernel, dilation = a.geometry.dilation;
  const int height = a.geometry.height, width = a.geometry.width;
  const int stride = a.geometry.stride;
  const int padding = dilation * (kernel / 2);
  int plane = at.channel / static_cast<int>(a.geometry.group_channels) * kernel * kernel;
  Accumulate<T> sum = a.pack.bias_of(at.channel);
  for (int tap_row = 0; tap_row < kernel; ++tap_row) {
    const int row = at.row * stride - padding + tap_row * dilation;
    for (int tap_column = 0; tap_column < kernel; ++tap_column, ++plane) {
      const int column = at.column * stride - padding + tap_column * dilation;
      sum += load_or_zero(a.features, at.batch, at.channel, row, column, height, width) *
             filter_at(a, at.batch, at.channel, plane, tap_row, tap_column, at.row, at.column);
    }
  }
  store(a.result.at(at.batch, at.channel, at.row, at.column), a.pack.clamp_min(sum));
}

// The output row (or column) whose window has the feature row `feature` under tap `tap`, or -1.
DDF_DEVICE int output_under(int feature, int tap, int padding, int dilation, int stride,
                            int outputs) {
  const int first = feature + padding - tap * dilation;
  if (first < 0 || first % stride != 0) return -1;
  const int output = first / stride;
  return output < outputs ? output : -1;
}

template <typename T>
DDF_KERNEL(kGenericThreads, 4)
grad_features_generic(Arguments<T> a, Slice slice) {
  const Position at = position_in(slice);
  if (!at.inside) return;
  const int kernel = a.geometry.kernel, dilation = a.geometry.dilation;
  const int out_height = a.geometry.out_height, out_width = a.geometry.out_width;
  const int stride = a.geometry.stride;
  const int padding = dilation * (kernel / 2);
  const int first_plane =
      at.channel / static_cast<int>(a.geometry.group_channels) * kernel * kernel;
  Accumulate<T> sum = 0;
  for (int tap_row = 0; tap_row < kernel; ++tap_row) {
    const int row = output_under(at.row, tap_row, padding, dilation, stride, out_height);
    if (row < 0) continue;
    for (int tap_column = 0; tap_column < kernel; ++tap_column) {
      const int column = output_under(at.column, tap_column, padding, dilation, stride, out_width);
      if (column < 0) continue;
      const int plane = first_plane + tap_row * kernel + tap_column;
      sum += load(a.grad.at(at.batch, at.channel, row, column)) *
             filter_at(a, at.batch, at.channel, plane, tap_row, tap_column, row, column);
    }
  }
  store(a.result.at(at.batch, at.channel, at.row, at.column), sum);
}

template <typename T>
DDF_KERNEL(kGenericThreads, 4)
grad_spatial_generic(Arguments<T> a, Slice slice) {
  const Position at = position_in(slice);
  if (!at.inside) return;
  const int kernel = a.geometry.kernel, dilation = a.geometry.dilation;
  const int height = a.geometry.height, width = a.geometry.width;
  const int stride = a.geometry.stride, group_channels = a.geometry.group_channels;
  const int tap_row = at.channel % (kernel * kernel) / kernel;
  const int tap_column = at.channel % kernel;
  const int row = at.row * stride + dilation * (tap_row - kernel / 2);
  const int column = at.column * stride + dilation * (tap_column - kernel / 2);
  const bool reads_filters = grad_reads_filters(a);
  const Accumulate<T> spatial =
      reads_filters ? load(a.spatial_filter.at(at.batch, at.channel, at.row, at.column)) : 0;
  const int first = at.channel / (kernel * kernel) * group_channels;
  Accumulate<T> sum = 0;
  for (int channel = first; channel < first + group_channels; ++channel) {
    Accumulate<T> term = load(a.grad.at(at.batch, channel, at.row, at.column)) *
                         load_or_zero(a.features, at.batch, channel, row, column, height, width);
    if (reads_filters) {
      const Accumulate<T> per_channel =
          load(a.channel_filter.at(at.batch, channel, tap_row, tap_column));
      term = with_combine(a.combine, [&](auto combine) {
        return decltype(combine)::grad_spatial(term, per_channel, spatial);
      });
    }
    sum += term;
  }
  store(a.result.at(at.batch, at.channel, at.row, at.column), sum);
}

// A block sums one tap of `channel_lanes` channels (a power of two) over all output pixels.
template <typename T>
DDF_KERNEL(kGenericThreads, 4)
grad_channel_generic(Arguments<T> a, int channel_lanes) {
  DDF_SHARED(Accumulate<T>, sums);
  const int kernel = a.geometry.kernel, dilation = a.geometry.dilation;
  const int height = a.geometry.height, width = a.geometry.width;
  const int stride = a.geometry.stride, channels = a.geometry.channels;
  const int taps = kernel * kernel;
  const int block = block_index();
  const int channel_blocks = (channels - 1) / channel_lanes + 1;
  const int batch = block / taps / channel_blocks;
  const int channel =
      block / taps % channel_blocks * channel_lanes + thread_index() % channel_lanes;
  const int tap_row = block % taps / kernel;
  const int tap_column = block % kernel;
  const int top = dilation * (tap_row - kernel / 2);
  const int left = dilation * (tap_column - kernel / 2);
  const bool reads_filters = grad_reads_filters(a);

  Accumulate<T> sum = 0;
  if (channel < channels) {
    const int group = channel / static_cast<int>(a.geometry.group_channels);
    const int plane = group * taps + block % taps;
    const Accumulate<T> per_channel =
        reads_filters ? load(a.channel_filter.at(batch, channel, tap_row, tap_column)) : 0;
    const int out_width = a.geometry.out_width;
    const unsigned pixels = a.geometry.out_height * a.geometry.out_width;
    const int pixel_lanes = kGenericThreads / channel_lanes;
    for (unsigned pixel = thread_index() / channel_lanes; pixel < pixels; pixel += pixel_lanes) {
      const int row = pixel / out_width;
      const int column = pixel % out_width;
      Accumulate<T> term = load(a.grad.at(batch, channel, row, column)) *
                           load_or_zero(a.features, batch, channel, row * stride + top,
                                        column * stride + left, height, width);
      if (reads_filters) {
        const Accumulate<T> spatial = load(a.spatial_filter.at(batch, plane, row, column));
        term = with_combine(a.combine, [&](auto combine) {
          return decltype(combine)::grad_channel(term, per_channel, spatial);
        });
      }
      sum += term;
    }
  }
  sums[thread_index()] = sum;
  for (int half = kGenericThreads / 2; half >= channel_lanes; half /= 2) {
    sync_threads();
    if (thread_index() < half) sums[thread_index()] += sums[thread_index() + half];
  }
  if (thread_index() < channel_lanes && channel < channels) {
    store(a.result.at(batch, channel, tap_row, tap_column), sums[thread_index()]);
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether neighbouring threads should take neighbouring channels.
template <typename T>
bool is_channels_last(const View<T>& tensor) {
  return tensor.channel_stride == 1 && tensor.column_stride != 1;
}

// Launches a generic kernel for [batch, channels, rows, columns] results, in several slices if one
// is not enough.
template <typename T, typename Kernel, typename Launch>
void launch_slices(const Arguments<T>& a, const char* name, Kernel kernel, int64_t channels,
                   int64_t rows, int64_t columns, Launch&& launch) {
  const int64_t batch = a.geometry.batch;
  const int64_t rows_at_once = std::clamp<int64_t>(kMaxElements32 / (channels * columns), 1, rows);
  const int64_t image = channels * rows_at_once * columns;
  const int64_t batches_at_once =
      rows_at_once < rows ? 1 : std::clamp<int64_t>(kMaxElements32 / image, 1, batch);
  for (int64_t first_batch = 0; first_batch < batch; first_batch += batches_at_once) {
    for (int64_t first_row = 0; first_row < rows; first_row += rows_at_once) {
      Slice slice;
      slice.first_batch = first_batch, slice.first_row = first_row;
      slice.batches = std::min(batches_at_once, batch - first_batch);
      slice.rows = std::min(rows_at_once, rows - first_row);
      slice.channels = channels, slice.columns = columns;
      slice.channels_last = is_channels_last(a.result);
      const int64_t count = slice.batches * channels * slice.rows * columns;
      launch(name, kernel, ceil_div(count, kGenericThreads), kGenericThreads, 0, a, slice);
    }
  }
}

}  // namespace ddf::cuda
