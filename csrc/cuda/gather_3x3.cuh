// 3 x 3 windows of any dilation and stride: the forward pass, and with Mirrored grad_features, also
// that of ddf_up. A thread gathers the values under the taps of its pixels, whose places it finds
// once for many channels; all loads of a step are in flight together. What lies outside the image
// is not loaded, but the first value of the image instead, so that no load waits for a branch.
#pragma once
#include "generic.cuh"

namespace ddf::cuda {

constexpr int kGatherThreads = 128;
// Channels of a block, whose sums are in registers.
constexpr int kGatherChannels = 16;
// Floats of a channel's nine taps in shared memory, 16-byte aligned.
constexpr int kGatherTapStride = 12;
// Channels and pixels of a thread in channels_last.
constexpr int kGatherQuad = 4;
constexpr int kGatherPixels = 2;

struct GatherGrid {
  int tiles, channel_blocks;
  int lanes;  // quads of channels of a block, in channels_last
};

// Of the result, and of what is gathered.
struct GatherSizes {
  int rows, columns, in_rows, in_columns, scale;
};

template <bool Mirrored>
DDF_DEVICE GatherSizes gather_sizes(const Geometry& g) {
  const int height = g.height, width = g.width, out_height = g.out_height, out_width = g.out_width;
  if (Mirrored) return {height, width, out_height, out_width, static_cast<int>(g.scale)};
  return {out_height, out_width, height, width, 1};
}

// The row (or column) of the input that pixel `at` reads under tap `tap` of its window, or -1.
template <bool Mirrored>
DDF_DEVICE int gathered_from(int at, int tap, const Geometry& g, int size) {
  const int dilation = g.dilation, stride = g.stride;
  if (Mirrored) return output_under(at, tap, dilation, dilation, stride, size);
  const int from = at * stride + (tap - 1) * dilation;
  return from >= 0 && from < size ? from : -1;
}

// A thread has one pixel and the channels of its block.
template <typename T, typename Combine, bool Mirrored>
DDF_KERNEL(kGatherThreads, 4)
gather_3x3(Arguments<T> a, GatherGrid grid, SubpixelStrides strides) {
  DDF_SHARED(float, channel_taps);
  const Geometry& g = a.geometry;
  const View<const T>& input = Mirrored ? a.grad : a.features;
  const auto [rows, columns, in_rows, in_columns, scale] = gather_sizes<Mirrored>(g);
  // Offsets within a plane have 32 bits.
  const int row_stride = input.row_stride, column_stride = input.column_stride;
  const auto [channel_block, tile, group, batch] =
      place_of_block(grid.channel_blocks, grid.tiles, g);
  const int pixel = tile * kGatherThreads + thread_index();
  const int64_t first = group * g.group_channels + channel_block * kGatherChannels;
  const int rest = static_cast<int>(g.group_channels) - channel_block * kGatherChannels;
  const int count = rest < kGatherChannels ? rest : kGatherChannels;
  const bool active = pixel < rows * columns;
  const int row = active ? pixel / columns : 0, column = active ? pixel % columns : 0;

  int from_rows[3], from_columns[3];
  DDF_UNROLL
  for (int tap = 0; tap < 3; ++tap) {
    from_rows[tap] = gathered_from<Mirrored>(row, tap, g, in_rows);
    from_columns[tap] = gathered_from<Mirrored>(column, tap, g, in_columns);
  }
  float sums[kGatherChannels] = {};

  DDF_UNROLL_NOT
  for (int subpixel = 0; subpixel < scale * scale; ++subpixel) {
    // The taps of the previous subpixel are read before they are overwritten.
    sync_threads();
    for (int i = thread_index(); i < count * 9; i += kGatherThreads) {
      const int tap = i % 9;
      channel_taps[i / 9 * kGatherTapStride + tap] =
          a.channel_filter.data == nullptr
              ? Combine::kNeutral
              : load(a.channel_filter.at(batch, first + i / 9, tap / 3, tap % 3) +
                     subpixel * strides.channel_filter);
    }
    sync_threads();
    if (!active) continue;

    float spatial[9];
    int offsets[9];
    bool inside[9];
    DDF_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int y = from_rows[tap / 3], x = from_columns[tap % 3];
      inside[tap] = y >= 0 && x >= 0;
      offsets[tap] = inside[tap] ? (y * scale + subpixel / scale) * row_stride +
                                       (x * scale + subpixel % scale) * column_stride
                                 : 0;
      spatial[tap] = Combine::kNeutral;
      // Mirrored: of the output that reads the pixel under this tap.
      if (a.spatial_filter.data != nullptr && (!Mirrored || inside[tap])) {
        spatial[tap] = load(
            a.spatial_filter.at(batch, group * 9 + tap, Mirrored ? y : row, Mirrored ? x : column) +
            subpixel * strides.spatial_filter);
      }
    }
    const T* from = input.at(batch, first, 0, 0);
    DDF_UNROLL
    for (int i = 0; i < kGatherChannels; ++i) {
      if (i >= count) break;
      float values[9], per_channel[kGatherTapStride];
      DDF_UNROLL
      for (int tap = 0; tap < 9; ++tap) values[tap] = load(from + offsets[tap]);
      DDF_UNROLL
      for (int tap = 0; tap < kGatherTapStride; tap += 4) {
        load_shared4(per_channel + tap, channel_taps + i * kGatherTapStride + tap);
      }
      DDF_UNROLL
      for (int tap = 0; tap < 9; ++tap) {
        // Outside the image the forward pass adds zeros times the filter, as the reference does;
        // there is no output there, of which grad_features would add something.
        if (Mirrored && !inside[tap]) continue;
        const float value = inside[tap] ? values[tap] : 0.f;
        sums[i] += value * Combine::weight(per_channel[tap], spatial[tap]);
      }
      from += input.channel_stride;
    }
  }
  if (!active) return;
  T* to = a.result.at(batch, first, row, column);
  DDF_UNROLL
  for (int i = 0; i < kGatherChannels; ++i) {
    if (i >= count) break;
    keep_branches();
    store(to, a.pack.clamp_min(sums[i] + a.pack.bias_of(first + i)));
    to += a.result.channel_stride;
  }
}

// Whether elements of the spatial filter are loaded even if it is None: of the image, for which its
// strides of 0 serve. 16 bits are converted in the branch that loads them otherwise, where they
// would be waited for; for GPUs before sm_100 ptxas moves other loads behind such waits if there is
// none.
template <typename T>
constexpr bool always_loads_filter() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
  return false;
#else
  return sizeof(T) == 2;
#endif
}

// A thread has four neighbouring channels of two neighbouring pixels of a row. Channels are
// adjacent and aligned in memory, and a multiple of four in a group.
template <typename T, typename Combine, bool Mirrored>
DDF_KERNEL(kGatherThreads, !Mirrored && always_loads_filter<T>() ? 8 : 4)
gather_3x3_channels_last(Arguments<T> a, GatherGrid grid, SubpixelStrides strides) {
  DDF_SHARED(float, channel_taps);
  const Geometry& g = a.geometry;
  const View<const T>& input = Mirrored ? a.grad : a.features;
  const auto [rows, columns, in_rows, in_columns, scale] = gather_sizes<Mirrored>(g);
  // Offsets within a plane have 32 bits.
  const int row_stride = input.row_stride, column_stride = input.column_stride;
  constexpr bool kAlwaysLoads = always_loads_filter<T>();
  const bool filtered = a.spatial_filter.data != nullptr;
  const int filter_row_stride = a.spatial_filter.row_stride;
  const int filter_column_stride = a.spatial_filter.column_stride;
  const int block_channels = grid.lanes * kGatherQuad;
  // Not a multiple of the banks.
  const int tap_stride = block_channels + kGatherQuad;
  const auto [channel_block, tile, group, batch] =
      place_of_block(grid.channel_blocks, grid.tiles, g);
  const int lane = thread_index() % grid.lanes, strip = thread_index() / grid.lanes;
  const int strips = kGatherThreads / grid.lanes;
  const int64_t first = group * g.group_channels + channel_block * block_channels;
  const int rest = static_cast<int>(g.group_channels) - channel_block * block_channels;
  const int count = rest < block_channels ? rest : block_channels;
  const int pairs_per_row = (columns - 1) / kGatherPixels + 1;
  const int pair = tile * strips + strip;
  const int row = pair / pairs_per_row, left = pair % pairs_per_row * kGatherPixels;
  const int pixels = columns - left < kGatherPixels ? columns - left : kGatherPixels;
  const bool active = strip < strips && row < rows && lane * kGatherQuad < count;
  const int64_t channel = first + (active ? lane * kGatherQuad : 0);

  int from_columns[3][kGatherPixels];
  DDF_UNROLL
  for (int tap = 0; tap < 3; ++tap) {
    DDF_UNROLL
    for (int j = 0; j < kGatherPixels; ++j) {
      from_columns[tap][j] =
          j < pixels ? gathered_from<Mirrored>(left + j, tap, g, in_columns) : -1;
    }
  }
  float sums[kGatherPixels][kGatherQuad] = {};  // [pixel][channel]

  DDF_UNROLL_NOT
  for (int subpixel = 0; subpixel < scale * scale; ++subpixel) {
    // As in gather_3x3.
    sync_threads();
    for (int i = thread_index(); i < count * 9; i += kGatherThreads) {
      const int tap = i % 9;
      channel_taps[tap * tap_stride + i / 9] =
          a.channel_filter.data == nullptr
              ? Combine::kNeutral
              : load(a.channel_filter.at(batch, first + i / 9, tap / 3, tap % 3) +
                     subpixel * strides.channel_filter);
    }
    sync_threads();
    if (!active) continue;

    const T* const origin = input.at(batch, channel, subpixel / scale, subpixel % scale);
    const T* const group_filter =
        kAlwaysLoads && !filtered
            ? origin
            : a.spatial_filter.at(batch, group * 9, 0, 0) + subpixel * strides.spatial_filter;
    // Unrolled, it would spill registers.
    DDF_UNROLL_NOT
    for (int tap_row = 0; tap_row < 3; ++tap_row) {
      const int y = gathered_from<Mirrored>(row, tap_row, g, in_rows);
      if (Mirrored && y < 0) continue;
      float values[3][kGatherPixels][kGatherQuad], spatial[3][kGatherPixels];
      DDF_UNROLL
      for (int tap = 0; tap < 3; ++tap) {
        DDF_UNROLL
        for (int j = 0; j < kGatherPixels; ++j) {
          keep_branches();
          const int x = from_columns[tap][j];
          const bool inside = y >= 0 && x >= 0;
          const int offset = inside ? scale * (y * row_stride + x * column_stride) : 0;
          load4(values[tap][j], origin + offset);
          // Of the first pixel instead of one outside the image.
          const int filter_column = Mirrored ? (inside ? x : 0) : (j < pixels ? left + j : left);
          spatial[tap][j] = Combine::kNeutral;
          if (kAlwaysLoads || filtered) {
            spatial[tap][j] = load(
                group_filter + (tap_row * 3 + tap) * a.spatial_filter.channel_stride +
                (Mirrored ? y : row) * filter_row_stride + filter_column * filter_column_stride);
          }
          if (kAlwaysLoads && !filtered) spatial[tap][j] = Combine::kNeutral;
        }
      }
      DDF_UNROLL
      for (int tap = 0; tap < 3; ++tap) {
        float per_channel[kGatherQuad];
        load_shared4(per_channel,
                     channel_taps + ((tap_row * 3 + tap) * tap_stride + lane * kGatherQuad));
        DDF_UNROLL
        for (int j = 0; j < kGatherPixels; ++j) {
          const bool inside = y >= 0 && from_columns[tap][j] >= 0;
          if (Mirrored && !inside) continue;
          DDF_UNROLL
          for (int i = 0; i < kGatherQuad; ++i) {
            const float value = inside ? values[tap][j][i] : 0.f;
            sums[j][i] += value * Combine::weight(per_channel[i], spatial[tap][j]);
          }
        }
      }
    }
  }
  if (!active) return;
  T* to = a.result.at(batch, channel, row, left);
  DDF_UNROLL
  for (int j = 0; j < kGatherPixels; ++j) {
    if (j >= pixels) break;
    float values[kGatherQuad];
    DDF_UNROLL
    for (int i = 0; i < kGatherQuad; ++i) {
      keep_branches();
      values[i] = a.pack.clamp_min(sums[j][i] + a.pack.bias_of(channel + i));
    }
    store4(to, values);
    to += a.result.column_stride;
  }
}

}  // namespace ddf::cuda
