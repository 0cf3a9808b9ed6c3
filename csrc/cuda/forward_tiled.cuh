// Windows larger than 3 x 3 of stride 1, and 3 x 3 of stride 2, of dilation 1, in either layout:
// the forward pass, and grad_features of stride 1 with the taps mirrored, as in forward_3x3.cuh.
// A block computes a tile of outputs of a channel block; a thread 4 neighbouring outputs of a row
// in each of 4 channels. The filters of the block are in shared memory. The loop over the rows of
// taps is not unrolled, because the taps would not fit in registers. Neighbouring threads have
// neighbouring outputs, or channels where those are adjacent in memory.
#pragma once
#include "filter_norm.cuh"
#include "load_row.cuh"

namespace ddf::cuda {

constexpr int kTiledThreads = 128;
constexpr int kBlockQuads = 32;  // of outputs
constexpr int kThreadOutputs = 4;
constexpr int kThreadChannels = 4;
constexpr int kBlockChannels = 64;  // at most

// Floats of shared memory: [k * k][outputs], then [k * k][channels].
constexpr int forward_tiled_floats(int kernel) {
  return kernel * kernel * (kBlockQuads * kThreadOutputs + kBlockChannels);
}

template <typename T, int Kernel, int Stride, typename Combine, bool Mirrored, bool ChannelsLast,
          bool Pack>
DDF_KERNEL(kTiledThreads, Kernel == 7 ? 2 : 3)
forward_tiled(Arguments<T> a, int tiles, int channel_blocks, bool vector) {
  static_assert(!Mirrored || (Stride == 1 && !Pack));
  constexpr int kTaps = Kernel * Kernel;
  constexpr int kPixels = kBlockQuads * kThreadOutputs;
  constexpr int kColumns = input_columns(Kernel, Stride);
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  float* const spatial_taps = shared;
  float* const channel_taps = shared + kTaps * kPixels;
  const int out_height = g.out_height;
  const int out_width = g.out_width;
  const int channel_block = block_index() % channel_blocks;
  const int tile = block_index() / channel_blocks % tiles;
  const int64_t image = block_index() / channel_blocks / tiles;
  const int64_t group = image % g.groups;
  const int64_t batch = image / g.groups;
  const int64_t first = group * g.group_channels + channel_block * kBlockChannels;
  const int64_t rest = g.group_channels - channel_block * kBlockChannels;
  const int channels = rest < kBlockChannels ? rest : kBlockChannels;
  const int quads_per_row = (out_width + kThreadOutputs - 1) / kThreadOutputs;

  for (int pixel = thread_index(); pixel < kPixels; pixel += kTiledThreads) {
    const int quad = tile * kBlockQuads + pixel / kThreadOutputs;
    const int row = quad / quads_per_row;
    const int column = quad % quads_per_row * kThreadOutputs + pixel % kThreadOutputs;
    const bool inside = row < out_height && column < out_width;
    DDF_UNROLL_NOT
    for (int tap = 0; tap < kTaps; ++tap) {
      // Mirrored: the taps that read a pixel belong to neighbouring outputs.
      const int y = row + (Mirrored ? Kernel / 2 - tap / Kernel : 0);
      const int x = column + (Mirrored ? Kernel / 2 - tap % Kernel : 0);
      float value = Combine::kNeutral;
      if (a.spatial_filter.data != nullptr && inside &&
          (!Mirrored || (y >= 0 && y < out_height && x >= 0 && x < out_width))) {
        value = load(a.spatial_filter.at(batch, group * kTaps + tap, y, x));
      }
      spatial_taps[tap * kPixels + pixel] = value;
    }
    if (Pack) normalize_spatial<kTaps>(a.pack, spatial_taps + pixel, kPixels);
  }
  for (int i = thread_index(); i < kBlockChannels * kTaps; i += kTiledThreads) {
    const int channel = i / kTaps;
    const int tap = i % kTaps;
    channel_taps[tap * kBlockChannels + channel] =
        a.channel_filter.data == nullptr || channel >= channels
            ? Combine::kNeutral
            : load(a.channel_filter.at(batch, first + channel, tap / Kernel, tap % Kernel));
  }
  if (Pack) {
    // The taps of a filter were written by several threads.
    sync_threads();
    for (int channel = thread_index(); channel < channels; channel += kTiledThreads) {
      normalize_channel<kTaps>(a.pack, first + channel, channel_taps + channel, kBlockChannels);
    }
  }
  sync_threads();

  const View<const T>& input = Mirrored ? a.grad : a.features;
  const int height = Mirrored ? out_height : static_cast<int>(g.height);
  const int width = Mirrored ? out_width : static_cast<int>(g.width);
  const int channel_quads = (channels + kThreadChannels - 1) / kThreadChannels;
  DDF_UNROLL_NOT
  for (int item = thread_index(); item < kBlockQuads * channel_quads; item += kTiledThreads) {
    const int block_quad = ChannelsLast ? item / channel_quads : item % kBlockQuads;
    const int channel =
        (ChannelsLast ? item % channel_quads : item / kBlockQuads) * kThreadChannels;
    const int quad = tile * kBlockQuads + block_quad;
    const int row = quad / quads_per_row;
    const int left = quad % quads_per_row * kThreadOutputs;
    if (row >= out_height) continue;
    const int top = row * Stride - Kernel / 2;
    const int column = left * Stride;
    float sums[kThreadChannels][kThreadOutputs] = {};
    DDF_UNROLL
    for (int i = 0; Pack && i < kThreadChannels; ++i) {
      const float bias = a.pack.bias_of(first + channel + (channel + i < channels ? i : 0));
      DDF_UNROLL
      for (int j = 0; j < kThreadOutputs; ++j) sums[i][j] = bias;
    }

    const auto add_row = [&](int tap_row, int y, auto masked) {
      float window[kThreadChannels][kColumns];
      const T* line = input.at(batch, first + channel, y, column);
      if (ChannelsLast) {
        DDF_UNROLL
        for (int x = 0; x < kColumns; ++x) {
          float values[kThreadChannels] = {};
          const int offset = x - Kernel / 2;
          if (column + offset >= 0 && column + offset < width) {
            load4(values, line + offset * input.column_stride);
          }
          DDF_UNROLL
          for (int i = 0; i < kThreadChannels; ++i) window[i][x] = values[i];
        }
      } else {
        DDF_UNROLL
        for (int i = 0; i < kThreadChannels; ++i) {
          // Channels after the last repeat the first; their sums are not stored.
          const T* const plane = line + (channel + i < channels ? i : 0) * input.channel_stride;
          if (vector) {
            load_row<Kernel / 2, true>(window[i], plane, column, width);
          } else {
            load_row<Kernel / 2, false>(window[i], plane, column, width);
          }
        }
      }
      DDF_UNROLL
      for (int tap_column = 0; tap_column < Kernel; ++tap_column) {
        const int tap = tap_row * Kernel + tap_column;
        float spatial[kThreadOutputs], per_channel[kThreadChannels];
        load_shared4(spatial, spatial_taps + tap * kPixels + block_quad * kThreadOutputs);
        load_shared4(per_channel, channel_taps + tap * kBlockChannels + channel);
        DDF_UNROLL
        for (int j = 0; j < kThreadOutputs; ++j) {
          const int x = j * Stride + (Mirrored ? Kernel - 1 - tap_column : tap_column);
          // Outputs outside the image have no filter: 0 * Inf must not be added.
          const int at = column + x - Kernel / 2;
          if (masked && (at < 0 || at >= width)) continue;
          DDF_UNROLL
          for (int i = 0; i < kThreadChannels; ++i) {
            const float filter = Combine::weight(per_channel[i], spatial[j]);
            sums[i][j] += window[i][x] * filter;
          }
        }
      }
    };
    const bool columns_inside = column >= Kernel / 2 && column - Kernel / 2 + kColumns <= width;
    DDF_UNROLL_NOT
    for (int tap_row = 0; tap_row < Kernel; ++tap_row) {
      const int y = top + (Mirrored ? Kernel - 1 - tap_row : tap_row);
      if (y < 0 || y >= height) {
        if (Mirrored) continue;
        // Zero features; 0 * Inf in the filter is NaN, as in the reference.
        DDF_UNROLL_NOT
        for (int tap_column = 0; tap_column < Kernel; ++tap_column) {
          const int tap = tap_row * Kernel + tap_column;
          DDF_UNROLL
          for (int j = 0; j < kThreadOutputs; ++j) {
            DDF_UNROLL
            for (int i = 0; i < kThreadChannels; ++i) {
              const float spatial = spatial_taps[tap * kPixels + block_quad * kThreadOutputs + j];
              const float per_channel = channel_taps[tap * kBlockChannels + channel + i];
              sums[i][j] += 0.f * Combine::weight(per_channel, spatial);
            }
          }
        }
      } else if (!Mirrored || columns_inside) {
        add_row(tap_row, y, False{});
      } else {
        add_row(tap_row, y, True{});
      }
    }

    DDF_UNROLL
    for (int i = 0; Pack && i < kThreadChannels; ++i) {
      DDF_UNROLL
      for (int j = 0; j < kThreadOutputs; ++j) sums[i][j] = a.pack.clamp_min(sums[i][j]);
    }
    T* const target = a.result.at(batch, first + channel, row, left);
    if (ChannelsLast) {
      DDF_UNROLL
      for (int j = 0; j < kThreadOutputs; ++j) {
        if (left + j >= out_width) continue;
        float values[kThreadChannels];
        DDF_UNROLL
        for (int i = 0; i < kThreadChannels; ++i) values[i] = sums[i][j];
        store4(target + j * a.result.column_stride, values);
      }
    } else {
      DDF_UNROLL
      for (int i = 0; i < kThreadChannels; ++i) {
        if (channel + i >= channels) continue;
        T* const line = target + i * a.result.channel_stride;
        if (vector) {
          store4(line, sums[i]);
        } else {
          DDF_UNROLL
          for (int j = 0; j < kThreadOutputs; ++j) {
            if (left + j < out_width) store(line + j, sums[i][j]);
          }
        }
      }
    }
  }
}

}  // namespace ddf::cuda
