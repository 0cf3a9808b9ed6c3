// Windows larger than 3 x 3 of stride 1, and 3 x 3 of stride 2, of dilation 1, in either layout:
// the forward pass, and grad_features of stride 1 with the taps mirrored, as in forward_3x3.cuh.
// A block computes a tile of outputs of a channel block; a thread a quad of outputs in each of 4
// channels. The filters of the block are in shared memory. The loop over the rows of
// taps is not unrolled, because the taps would not fit in registers. Neighbouring threads have
// neighbouring outputs, or channels where those are adjacent in memory.
#pragma once
#include "load_row.cuh"

namespace ddf::cuda {

constexpr int kTiledThreads = 128;
constexpr int kThreadChannels = 4;
constexpr int kBlockChannels = 64;  // at most
constexpr int kTilePixels = kTileQuads * kQuadOutputs;
// Floats of shared memory from the channels' filters at a tap to those at the next, 16-byte
// aligned: neighbouring taps, which a warp writes together, are in different banks.
constexpr int kChannelStride = kBlockChannels + 4;

// Floats of shared memory: [k * k][outputs], then [k * k][channels].
constexpr int forward_tiled_floats(int kernel) {
  return kernel * kernel * (kTilePixels + kChannelStride);
}

// Blocks of a multiprocessor, for which ptxas limits the registers where one or two more than it
// takes anyway would cost a block.
template <int Kernel, bool Mirrored, bool ChannelsLast>
constexpr int tiled_blocks() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  if (Kernel == 5 && Mirrored && !ChannelsLast) return 4;
#else
  if (Kernel == 5 && !Mirrored && ChannelsLast) return 5;
#endif
  return Kernel == 7 ? 2 : 3;
}

template <typename T, int Kernel, int Stride, typename Combine, bool Mirrored, bool ChannelsLast>
DDF_KERNEL(kTiledThreads, tiled_blocks<Kernel, Mirrored, ChannelsLast>())
forward_tiled(Arguments<T> a, QuadGrid grid, int channel_blocks, bool vector) {
  static_assert(!Mirrored || Stride == 1);
  constexpr int kTaps = Kernel * Kernel;
  constexpr int kColumns = input_columns(Kernel, Stride);
  const Geometry& g = a.geometry;
  DDF_SHARED(float, shared);
  auto* const spatial_taps = shared;
  auto* const channel_taps = shared + kTaps * kTilePixels;
  const int out_height = g.out_height;
  const int out_width = g.out_width;
  const BlockPlace place = place_of_block(channel_blocks, grid.tiles, g);
  const int64_t group = place.group, batch = place.batch;
  const int64_t first = group * g.group_channels + place.first * kBlockChannels;
  const int64_t rest = g.group_channels - place.first * kBlockChannels;
  const int channels = rest < kBlockChannels ? rest : kBlockChannels;

  for (int pixel = thread_index(); pixel < kTilePixels; pixel += kTiledThreads) {
    const QuadGrid::Place quad = grid.place_of(place.second, pixel / kQuadOutputs);
    const int row = quad.row;
    const int column = quad.left + pixel % kQuadOutputs;
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
      spatial_taps[tap * kTilePixels + pixel] = value;
    }
  }
  for (int i = thread_index(); i < kBlockChannels * kTaps; i += kTiledThreads) {
    const int channel = i / kTaps;
    const int tap = i % kTaps;
    channel_taps[tap * kChannelStride + channel] =
        a.channel_filter.data == nullptr || channel >= channels
            ? Combine::kNeutral
            : load(a.channel_filter.at(batch, first + channel, tap / Kernel, tap % Kernel));
  }
  sync_threads();

  const View<const T>& input = Mirrored ? a.grad : a.features;
  const int height = Mirrored ? out_height : static_cast<int>(g.height);
  const int width = Mirrored ? out_width : static_cast<int>(g.width);
  const int channel_quads = (channels + kThreadChannels - 1) / kThreadChannels;
  DDF_UNROLL_NOT
  for (int item = thread_index(); item < kTileQuads * channel_quads; item += kTiledThreads) {
    const int block_quad = ChannelsLast ? item / channel_quads : item % kTileQuads;
    const int channel = (ChannelsLast ? item % channel_quads : item / kTileQuads) * kThreadChannels;
    const QuadGrid::Place quad = grid.place_of(place.second, block_quad);
    const int row = quad.row, left = quad.left;
    if (row >= out_height || left >= out_width) continue;
    const int top = row * Stride - Kernel / 2;
    const int column = left * Stride;
    float sums[kThreadChannels][kQuadOutputs] = {};

    const auto add_row = [&](int tap_row, int y, auto masked) {
      float window[kThreadChannels][kColumns];
      const T* line = input.at(batch, first + channel, y, column);
      if (ChannelsLast) {
        DDF_UNROLL
        for (int x = 0; x < kColumns; ++x) {
          float values[kThreadChannels];
          const int offset = x - Kernel / 2;
          load4_if(values, line + offset * input.column_stride,
                   column + offset >= 0 && column + offset < width);
          DDF_UNROLL
          for (int i = 0; i < kThreadChannels; ++i) window[i][x] = values[i];
        }
      } else {
        const auto load_rows = [&](auto aligned) {
          DDF_UNROLL
          for (int i = 0; i < kThreadChannels; ++i) {
            // Channels after the last repeat the first; their sums are not stored.
            const T* const plane = line + (channel + i < channels ? i : 0) * input.channel_stride;
            load_row<Kernel / 2, decltype(aligned)::value>(window[i], plane, column, width, true);
          }
        };
        if (vector) {
          load_rows(True{});
        } else {
          load_rows(False{});
        }
      }
      DDF_UNROLL
      for (int tap_column = 0; tap_column < Kernel; ++tap_column) {
        const int tap = tap_row * Kernel + tap_column;
        float spatial[kQuadOutputs], per_channel[kThreadChannels];
        load_shared4(spatial, spatial_taps + tap * kTilePixels + block_quad * kQuadOutputs);
        load_shared4(per_channel, channel_taps + tap * kChannelStride + channel);
        DDF_UNROLL
        for (int j = 0; j < kQuadOutputs; ++j) {
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
          for (int j = 0; j < kQuadOutputs; ++j) {
            DDF_UNROLL
            for (int i = 0; i < kThreadChannels; ++i) {
              const float spatial = spatial_taps[tap * kTilePixels + block_quad * kQuadOutputs + j];
              const float per_channel = channel_taps[tap * kChannelStride + channel + i];
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
    for (int i = 0; i < kThreadChannels; ++i) {
      const float bias = a.pack.bias_of(first + channel + (channel + i < channels ? i : 0));
      DDF_UNROLL
      for (int j = 0; j < kQuadOutputs; ++j) sums[i][j] = a.pack.clamp_min(sums[i][j] + bias);
    }
    T* const target = a.result.at(batch, first + channel, row, left);
    if (ChannelsLast) {
      DDF_UNROLL
      for (int j = 0; j < kQuadOutputs; ++j) {
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
          for (int j = 0; j < kQuadOutputs; ++j) {
            if (left + j < out_width) store(line + j, sums[i][j]);
          }
        }
      }
    }
  }
}

}  // namespace ddf::cuda
