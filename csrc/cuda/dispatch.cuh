// Chooses the kernel, tiling and grid of a call. `launch(name, kernel, blocks, threads,
// shared_bytes, arguments...)` launches a kernel: on a device in launcher.cuh, on the host in the
// tests.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels.cuh"

namespace ddf::cuda {

// The tiling depends on the shape only, never on the device, and so does the order of sums.
inline Tiling tiling_of(const Geometry& g) {
  Tiling tiling;
  tiling.tiles_per_row = ceil_div(g.width, kTileColumns);
  tiling.tiles = tiling.tiles_per_row * ceil_div(g.height, kTileRows);
  tiling.tile_lanes = 8;
  while (tiling.tile_lanes < tiling.tiles && tiling.tile_lanes < kForward3x3Threads) {
    tiling.tile_lanes *= 2;
  }
  // Fewer tiles in a block, and more lanes for each, where many lanes of the last block have none.
  const auto active = [&](int64_t lanes) {
    return static_cast<double>(tiling.tiles) / (ceil_div(tiling.tiles, lanes) * lanes);
  };
  while (tiling.tile_lanes > 16 && active(tiling.tile_lanes) < 0.85) tiling.tile_lanes /= 2;
  // Larger channel blocks read the spatial filter less often; smaller ones give more blocks, and a
  // large GPU needs several for each of its about 130 multiprocessors.
  const int64_t lanes = kForward3x3Threads / tiling.tile_lanes;
  const int64_t tile_blocks = ceil_div(tiling.tiles, tiling.tile_lanes);
  int64_t block_channels = 32 * lanes;
  while (block_channels > 4 * lanes &&
         g.batch * tile_blocks * g.groups * ceil_div(g.group_channels, block_channels) < 1024) {
    block_channels /= 2;
  }
  tiling.block_channels = block_channels < g.group_channels ? block_channels : g.group_channels;
  tiling.channel_blocks = ceil_div(g.group_channels, tiling.block_channels);
  return tiling;
}

inline int64_t blocks_of(const Geometry& g, const Tiling& tiling) {
  return g.batch * ceil_div(tiling.tiles, tiling.tile_lanes) * g.groups * tiling.channel_blocks;
}

// Whether groups of `count` elements along the dimension of stride 1 are aligned; strides are the
// others.
template <typename T>
bool is_aligned_by(int count, const View<T>& tensor, std::initializer_list<int64_t> strides) {
  return reinterpret_cast<uintptr_t>(tensor.data) % (count * sizeof(T)) == 0 &&
         std::all_of(strides.begin(), strides.end(), [&](int64_t s) { return s % count == 0; });
}

template <typename T>
bool has_aligned_rows(const View<T>& tensor, int count = 4) {
  return is_aligned_by(count, tensor,
                       {tensor.batch_stride, tensor.channel_stride, tensor.row_stride});
}

template <typename T>
bool has_aligned_channels(const View<T>& tensor) {
  return tensor.channel_stride == 1 &&
         is_aligned_by(4, tensor, {tensor.batch_stride, tensor.row_stride, tensor.column_stride});
}

template <int Value>
using Constant = std::integral_constant<int, Value>;

// Calls function(kernel, stride) with constants if there are kernels for such windows beside those
// of is_3x3; returns its result, otherwise false.
template <typename Function>
bool with_kernel_size(const Geometry& g, Function&& function) {
  if (g.dilation != 1) return false;
  if (g.kernel == 3 && g.stride == 2) return function(Constant<3>{}, Constant<2>{});
  if (g.kernel == 5 && g.stride == 1) return function(Constant<5>{}, Constant<1>{});
  if (g.kernel == 7 && g.stride == 1) return function(Constant<7>{}, Constant<1>{});
  return false;
}

// Whether windows are 3 x 3, of stride and dilation 1.
inline bool is_3x3(const Geometry& g) { return g.kernel == 3 && g.dilation == 1 && g.stride == 1; }

// Whether rows are contiguous; true for an absent tensor.
template <typename T>
bool has_contiguous_rows(const View<T>& tensor) {
  return tensor.data == nullptr || tensor.column_stride == 1;
}

// Runs forward_3x3 if it supports the call; returns whether it did.
template <bool Mirrored, bool Pack, typename T, typename Launch>
bool launch_forward_3x3(const Arguments<T>& a, const char* name, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const View<const T>& input = Mirrored ? a.grad : a.features;
    const bool fits = is_3x3(g) && has_contiguous_rows(input) &&
                      has_contiguous_rows(a.spatial_filter) && has_contiguous_rows(a.result);
    if (!fits) return false;
    const Tiling tiling = tiling_of(g);
    const int64_t blocks = blocks_of(g, tiling);
    if (blocks > kMaxBlocks) return false;
    const bool vector = g.width % 4 == 0 && has_aligned_rows(input) && has_aligned_rows(a.result) &&
                        (Mirrored || has_aligned_rows(a.spatial_filter));
    const size_t shared = sizeof(float) * kTapStride * tiling.block_channels;
    const auto kernel = with_combine(a.combine, [&](auto combine) {
      using Combine = decltype(combine);
      return vector ? DDF_HANDLE(forward_3x3<T, Combine, Mirrored, true, Pack>)
                    : DDF_HANDLE(forward_3x3<T, Combine, Mirrored, false, Pack>);
    });
    launch(name, kernel, blocks, kForward3x3Threads, shared, a, tiling);
    return true;
  }
}

inline StripGrid strip_grid_of(const Geometry& g) {
  StripGrid grid;
  grid.per_row = ceil_div(g.width, kStripColumns);
  grid.columns = ceil_div(g.width, grid.per_row);
  grid.rows = ceil_div(g.height, kStripRows);
  const int64_t quads = g.group_channels / kStripChannels;
  grid.channel_blocks = ceil_div(quads, kStripThreads);
  grid.lanes = ceil_div(quads, grid.channel_blocks);
  // With narrow groups, not all threads are used: shared memory has no room for their strips.
  grid.per_block = std::min(kStripThreads / grid.lanes, 16);
  return grid;
}

// Runs forward_3x3_channels_last if it supports the call; returns whether it did.
template <bool Mirrored, bool Pack, typename T, typename Launch>
bool launch_forward_3x3_channels_last(const Arguments<T>& a, const char* name, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const bool fits = is_3x3(g) && g.group_channels % kStripChannels == 0 &&
                      has_aligned_channels(Mirrored ? a.grad : a.features) &&
                      has_aligned_channels(a.result);
    if (!fits) return false;
    const StripGrid grid = strip_grid_of(g);
    const int64_t count = g.batch * g.groups * grid.per_row * grid.rows;
    const int64_t blocks = ceil_div(count, grid.per_block) * grid.channel_blocks;
    if (blocks > kMaxBlocks) return false;
    const auto kernel = with_combine(a.combine, [](auto combine) {
      return DDF_HANDLE(forward_3x3_channels_last<T, decltype(combine), Mirrored, Pack>);
    });
    launch(name, kernel, blocks, kStripThreads, sizeof(float) * kStripFloats * grid.per_block, a,
           grid);
    return true;
  }
}

inline QuadGrid quad_grid_of(const Geometry& g) {
  QuadGrid grid;
  const int quads = ceil_div(g.out_width, kQuadOutputs);
  const int bands = ceil_div(quads, kBandQuads);
  grid.band_quads = ceil_div(quads, bands);
  grid.band_tiles = ceil_div(g.out_height * grid.band_quads, kTileQuads);
  grid.tiles = bands * grid.band_tiles;
  return grid;
}

// Runs forward_tiled if it supports the call; returns whether it did.
template <bool Mirrored, typename T, typename Launch>
bool launch_forward_tiled(const Arguments<T>& a, const char* name, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const View<const T>& input = Mirrored ? a.grad : a.features;
    const bool rows = has_contiguous_rows(input) && has_contiguous_rows(a.result);
    const bool quads = g.group_channels % kThreadChannels == 0 && has_aligned_channels(input) &&
                       has_aligned_channels(a.result);
    if (!rows && !quads) return false;
    return with_kernel_size(g, [&](auto kernel_size, auto stride) {
      constexpr int kKernel = decltype(kernel_size)::value;
      constexpr int kStride = decltype(stride)::value;
      if constexpr (Mirrored && kStride != 1) {
        return false;
      } else {
        const QuadGrid grid = quad_grid_of(g);
        const int channel_blocks = ceil_div(g.group_channels, kBlockChannels);
        const int64_t blocks = g.batch * g.groups * grid.tiles * channel_blocks;
        if (blocks > kMaxBlocks) return false;
        const bool vector = g.width % 4 == 0 && g.out_width % 4 == 0 && has_aligned_rows(input) &&
                            has_aligned_rows(a.result);
        const auto kernel = with_combine(a.combine, [&](auto combine) {
          using Combine = decltype(combine);
          return rows ? DDF_HANDLE(forward_tiled<T, kKernel, kStride, Combine, Mirrored, false>)
                      : DDF_HANDLE(forward_tiled<T, kKernel, kStride, Combine, Mirrored, true>);
        });
        launch(name, kernel, blocks, kTiledThreads, sizeof(float) * forward_tiled_floats(kKernel),
               a, grid, channel_blocks, vector);
        return true;
      }
    });
  }
}

// Whether the offsets within one channel of this size have 32 bits.
template <typename T>
bool has_short_offsets(const View<T>& tensor, int64_t rows, int64_t columns) {
  return (rows - 1) * tensor.row_stride + (columns - 1) * tensor.column_stride <= kMaxElements32;
}

// Runs gather_3x3 if it supports the call, in either memory format; returns whether it did.
template <bool Mirrored, typename T, typename Launch>
bool launch_gather_3x3(const Arguments<T>& a, const SubpixelStrides& strides, const char* name,
                       Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const View<const T>& input = Mirrored ? a.grad : a.features;
    const bool fits =
        g.kernel == 3 && has_short_offsets(a.spatial_filter, g.out_height, g.out_width) &&
        (Mirrored ? has_short_offsets(a.grad, g.scale * g.out_height, g.scale * g.out_width)
                  : has_short_offsets(a.features, g.height, g.width));
    if (!fits) return false;
    const int64_t rows = Mirrored ? g.height : g.out_height;
    const int64_t columns = Mirrored ? g.width : g.out_width;
    const bool quads = g.group_channels % kGatherQuad == 0 && has_aligned_channels(input) &&
                       has_aligned_channels(a.result);
    int64_t block_channels = kGatherChannels, tiles = ceil_div(rows * columns, kGatherThreads);
    GatherGrid grid{};
    size_t floats = kGatherTapStride * kGatherChannels;
    if (quads) {
      // The fewest blocks of at most a warp of lanes, of equal size.
      const int64_t count = g.group_channels / kGatherQuad;
      grid.lanes = ceil_div(count, ceil_div(count, kLanes));
      block_channels = grid.lanes * kGatherQuad;
      tiles = ceil_div(rows * ceil_div(columns, kGatherPixels), kGatherThreads / grid.lanes);
      floats = 9 * (block_channels + kGatherQuad);
    }
    grid.tiles = tiles;
    grid.channel_blocks = ceil_div(g.group_channels, block_channels);
    const int64_t blocks = g.batch * g.groups * tiles * grid.channel_blocks;
    if (blocks > kMaxBlocks) return false;
    const auto kernel = with_combine(a.combine, [&](auto combine) {
      using Combine = decltype(combine);
      return quads ? DDF_HANDLE(gather_3x3_channels_last<T, Combine, Mirrored>)
                   : DDF_HANDLE(gather_3x3<T, Combine, Mirrored>);
    });
    launch(name, kernel, blocks, kGatherThreads, sizeof(float) * floats, a, grid, strides);
    return true;
  }
}

// With the epilogue of a.pack.
template <typename T, typename Launch>
void launch_forward_any(const Arguments<T>& a, const char* name, Launch&& launch) {
  if (launch_forward_tiled<false>(a, name, launch)) return;
  if (launch_gather_3x3<false>(a, {}, name, launch)) return;
  const Geometry& g = a.geometry;
  launch_slices(a, name, DDF_HANDLE(forward_generic<T>), g.channels, g.out_height, g.out_width,
                launch);
}

template <typename T, typename Launch>
void launch_forward(const Arguments<T>& a, Launch&& launch) {
  if (launch_forward_3x3<false, false>(a, "ddf forward, 3x3", launch)) return;
  if (launch_forward_3x3_channels_last<false, false>(a, "ddf forward, 3x3 channels_last", launch)) {
    return;
  }
  launch_forward_any(a, "ddf forward", launch);
}

// ddf with the prologue and epilogue of a.pack. The channel filter is contiguous, the spatial
// filter contiguous or channels_last. allocate(n) returns scratch memory for n elements, valid
// until the kernels are done, for normalized filters where no kernel fuses the prologue.
template <typename T, typename Allocate, typename Launch>
void launch_pack(Arguments<T> a, Allocate&& allocate, Launch&& launch) {
  if (launch_forward_3x3<false, true>(a, "ddf_pack, 3x3", launch)) return;
  if (launch_forward_3x3_channels_last<false, true>(a, "ddf_pack, 3x3 channels_last", launch))
    return;
  const Geometry& g = a.geometry;
  const auto normalize = [&](View<const T>& filter, int64_t filters, int64_t pixels,
                             bool taps_inner, Accumulate<T> scale, const Accumulate<T>* std) {
    FilterNormArguments<T> norm{};
    norm.batch = g.batch;
    norm.filters = filters;
    norm.taps = g.taps();
    norm.pixels = pixels;
    norm.taps_inner = taps_inner;
    norm.x = filter.data;
    norm.std = std;
    norm.scale = scale;
    norm.eps = a.pack.eps;
    norm.result = allocate(g.batch * filters * g.taps() * pixels);
    launch_filter_norm(norm, launch);
    filter.data = norm.result;
  };
  normalize(a.channel_filter, g.channels, 1, true, a.pack.channel_scale, a.pack.channel_std);
  normalize(a.spatial_filter, g.groups, g.out_height * g.out_width,
            a.spatial_filter.channel_stride == 1, a.pack.spatial_scale, nullptr);
  launch_forward_any(a, "ddf_pack", launch);
}

template <typename T, typename Launch>
void launch_grad_features(const Arguments<T>& a, Launch&& launch) {
  if (launch_forward_3x3<true, false>(a, "ddf grad_features, 3x3", launch)) return;
  if (launch_forward_3x3_channels_last<true, false>(a, "ddf grad_features, 3x3 channels_last",
                                                    launch)) {
    return;
  }
  if (launch_forward_tiled<true>(a, "ddf grad_features, tiled", launch)) return;
  if (launch_gather_3x3<true>(a, {}, "ddf grad_features, gathered", launch)) return;
  const Geometry& g = a.geometry;
  launch_slices(a, "ddf grad_features", DDF_HANDLE(grad_features_generic<T>), g.channels, g.height,
                g.width, launch);
}

// Computes grad_features of ddf_up, which is a.result.
template <typename T, typename Launch>
void launch_upsample_grad_features(const Arguments<T>& a, const SubpixelStrides& strides,
                                   Launch&& launch) {
  if (launch_gather_3x3<true>(a, strides, "ddf_up grad_features, gathered", launch)) return;
  const Geometry& g = a.geometry;
  launch_slices(a, "ddf_up grad_features", DDF_HANDLE(upsample_grad_features_generic<T>),
                g.channels, g.height, g.width,
                [&](const auto&... given) { launch(given..., strides); });
}

// Splits the channels of a group into blocks of at most `most`, and of a multiple of `unit`, which
// divides both: further if a large GPU would have too few blocks.
template <typename T>
void split_channels(PartialSums<T>& partials, const Geometry& g, int64_t most, int64_t unit = 1) {
  const int64_t channels = g.group_channels / unit;
  int64_t block_channels = ceil_div(channels, ceil_div(channels, most / unit));
  const auto blocks = [&] {
    return g.batch * g.groups * partials.tiles * ceil_div(channels, block_channels);
  };
  while (block_channels * unit > 64 && blocks() < 512) {
    block_channels = ceil_div(block_channels, 2);
  }
  partials.block_channels = block_channels * unit;
  partials.channel_blocks = ceil_div(channels, block_channels);
}

// No values if there are no partial sums.
template <typename T>
Reduction<T> reduction_of(const View<T>& result, const float* partials, int64_t batch,
                          int64_t channels, int64_t rows, int64_t columns, int count) {
  const int64_t values = partials == nullptr ? 0 : batch * channels * rows * columns;
  return {result,
          partials,
          values,
          static_cast<int>(channels),
          static_cast<int>(rows),
          static_cast<int>(columns),
          count};
}

// Memory for the partial sums of grad_channel, or null: the gradient itself, if it has one sum of
// float32 for each value.
template <typename T, typename Allocate>
float* channel_partials_of(const Geometry& g, const View<T>& result, int64_t tiles,
                           Allocate&& allocate) {
  if (result.data == nullptr) return nullptr;
  if constexpr (std::is_same_v<T, float>) {
    const bool contiguous = result.batch_stride == g.channels * g.taps() &&
                            result.channel_stride == g.taps() && result.row_stride == g.kernel &&
                            result.column_stride == 1;
    const bool aligned = reinterpret_cast<uintptr_t>(result.data) % (4 * sizeof(T)) == 0;
    if (tiles == 1 && contiguous && aligned) return result.data;
  }
  return allocate(tiles * g.batch * g.channels * g.taps());
}

template <typename T>
Reduction<T> channel_reduction(const Geometry& g, const View<T>& result, const float* partials,
                               int tiles) {
  if (static_cast<const void*>(partials) == result.data) partials = nullptr;
  return reduction_of(result, partials, g.batch, g.channels, g.kernel, g.kernel, tiles);
}

template <typename T>
Reduction<T> spatial_reduction(const Geometry& g, const PartialSums<T>& partials) {
  return reduction_of(partials.grad_spatial, partials.spatial_partials, g.batch,
                      g.groups * g.taps(), g.out_height, g.out_width, partials.channel_blocks);
}

// Adds up the partial sums of both, of which one may have no values.
template <typename T, typename Launch>
void launch_reductions(const Reduction<T>& first, const Reduction<T>& second, Launch&& launch) {
  const int64_t blocks = ceil_div(first.values, kLanes) + ceil_div(second.values, kLanes);
  if (blocks == 0) return;
  launch("ddf gradients of filters, reduction", DDF_HANDLE(reduce_partials<T>), blocks,
         kReduceThreads, sizeof(float) * kReduceThreads, first, second);
}

// Where the spatial filter's gradient goes: to itself, or to partial sums of the channel blocks,
// which are allocated.
template <typename T, typename Allocate>
void set_spatial(PartialSums<T>& partials, const Geometry& g, const View<T>& result,
                 Allocate&& allocate) {
  partials.grad_spatial = result;
  partials.spatial_partials = nullptr;
  if (partials.channel_blocks > 1 && result.data != nullptr) {
    const int64_t values = g.batch * g.groups * g.taps() * g.out_height * g.out_width;
    partials.spatial_partials = allocate(partials.channel_blocks * values);
  }
}

// Allocates the partial sums, calls launch_partials(partials) and reduces them.
template <typename T, typename Allocate, typename Launch, typename LaunchPartials>
void launch_with_partials(PartialSums<T> partials, const Geometry& g, const Gradients<T>& to,
                          Allocate&& allocate, Launch&& launch, LaunchPartials&& launch_partials) {
  partials.channel_partials = channel_partials_of(g, to.channel_filter, partials.tiles, allocate);
  set_spatial(partials, g, to.spatial_filter, allocate);
  launch_partials(partials);
  launch_reductions(
      channel_reduction(g, to.channel_filter, partials.channel_partials, partials.tiles),
      spatial_reduction(g, partials), launch);
}

// Runs backward_3x3 if it supports the call; returns whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_backward_3x3(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate,
                         Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    a.result = to.features;
    const bool fits = is_3x3(g) && has_contiguous_rows(a.grad) && has_contiguous_rows(a.features) &&
                      has_contiguous_rows(a.result);
    if (!fits) return false;
    const int64_t quads = ceil_div(g.height, kBackwardRows) * ceil_div(g.width, kBackwardColumns);
    PartialSums<T> partials{};
    int lanes = kLanes;
    // Fewer lanes in a tile, and more tiles, where many of the last one have no pixels. A warp then
    // has several channels at once.
    for (;; lanes /= 2) {
      partials.tiles = ceil_div(quads, lanes);
      const bool enough = quads >= 0.85 * partials.tiles * lanes;
      if (enough || lanes == 8 || g.group_channels % (2 * kLanes / lanes) != 0) break;
    }
    const bool vector = g.width % 4 == 0 && has_aligned_rows(a.grad) &&
                        has_aligned_rows(a.features) && has_aligned_rows(a.result);
    const bool copies =
        g.width % 2 == 0 && has_aligned_rows(a.grad, 2) && has_aligned_rows(a.features, 2);
    const int at_once = kLanes / lanes;
    split_channels(partials, g, backward_block_channels<T>(copies) / at_once * at_once, at_once);
    const int64_t blocks = g.batch * g.groups * partials.tiles * partials.channel_blocks;
    if (blocks > kMaxBlocks) return false;
    const int copied = copies ? 2 * kBackwardCopied<T> : 0;
    const size_t shared =
        sizeof(float) *
        std::max(kBackwardTapStride * partials.block_channels + copied, kBackwardSumFloats);
    const auto kernel = with_combine(a.combine, [&](auto combine) {
      using Combine = decltype(combine);
      return vector   ? DDF_HANDLE(backward_3x3<T, Combine, true, true>)
             : copies ? DDF_HANDLE(backward_3x3<T, Combine, false, true>)
                      : DDF_HANDLE(backward_3x3<T, Combine, false, false>);
    });
    launch_with_partials(partials, g, to, allocate, launch, [&](const PartialSums<T>& ready) {
      launch("ddf backward, 3x3", kernel, blocks, kBackwardThreads, shared, a, ready, lanes);
    });
    return true;
  }
}

// Runs grad_filters if it supports the call; returns whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_grad_filters_nchw(const Arguments<T>& a, const Gradients<T>& to, Allocate&& allocate,
                              Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    if (!has_contiguous_rows(a.grad) || !has_contiguous_rows(a.features) ||
        !has_contiguous_rows(a.spatial_filter))
      return false;
    return with_kernel_size(g, [&](auto kernel_size, auto stride) {
      constexpr int kKernel = decltype(kernel_size)::value;
      constexpr int kStride = decltype(stride)::value;
      PartialSums<T> partials{};
      const QuadGrid grid = quad_grid_of(g);
      partials.tiles = grid.tiles;
      split_channels(partials, g, g.group_channels);
      const int64_t blocks = g.batch * g.groups * partials.tiles * partials.channel_blocks;
      if (blocks > kMaxBlocks) return false;
      const bool vector = g.width % 4 == 0 && g.out_width % 4 == 0 &&
                          has_aligned_rows(a.features) && has_aligned_rows(a.grad) &&
                          has_aligned_rows(a.spatial_filter);
      const auto kernel = with_combine(a.combine, [](auto combine) {
        return DDF_HANDLE(grad_filters<T, kKernel, kStride, decltype(combine)>);
      });
      launch_with_partials(partials, g, to, allocate, launch, [&](const PartialSums<T>& ready) {
        launch("ddf grad_filters", kernel, blocks, grad_filters_threads(kKernel),
               sizeof(float) * grad_filters_shared_floats(kKernel), a, ready, grid, vector);
      });
      return true;
    });
  }
}

// Runs grad_filters_gathered if it supports the call; returns whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_grad_filters_gathered(const Arguments<T>& a, const Gradients<T>& to,
                                  Allocate&& allocate, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const bool fits = g.kernel == 3 && has_short_offsets(a.features, g.height, g.width) &&
                      has_short_offsets(a.grad, g.out_height, g.out_width);
    if (!fits) return false;
    PartialSums<T> partials{};
    partials.tiles = ceil_div(g.out_height * g.out_width, kGatheredTile);
    split_channels(partials, g, g.group_channels);
    const int64_t blocks = g.batch * g.groups * partials.tiles * partials.channel_blocks;
    if (blocks > kMaxBlocks) return false;
    const auto kernel = with_combine(a.combine, [](auto combine) {
      return DDF_HANDLE(grad_filters_gathered<T, decltype(combine)>);
    });
    launch_with_partials(partials, g, to, allocate, launch, [&](const PartialSums<T>& ready) {
      launch("ddf grad_filters, gathered", kernel, blocks, kGatheredThreads,
             sizeof(float) * kGatheredSharedFloats, a, ready);
    });
    return true;
  }
}

inline TileGrid tile_grid_of(const Geometry& g, int most_columns) {
  TileGrid grid;
  grid.per_row = ceil_div(g.out_width, most_columns);
  grid.columns = ceil_div(g.out_width, grid.per_row);
  grid.rows = ceil_div(g.out_height, kTileOutputRows);
  const int64_t count = g.group_channels / kQuadChannels;
  // The most lanes that leave the fewest without channels.
  grid.lanes = kLanes;
  for (const int lanes : {16, 8}) {
    if (ceil_div(count, lanes) * lanes < ceil_div(count, grid.lanes) * grid.lanes) {
      grid.lanes = lanes;
    }
  }
  return grid;
}

// The pixels (first_row + i * step, first_column + j * step) of a tensor.
template <typename T>
View<T> pixels_of(View<T> tensor, int64_t first_row, int64_t first_column, int64_t step) {
  if (tensor.data == nullptr) return tensor;
  tensor.data += first_row * tensor.row_stride + first_column * tensor.column_stride;
  tensor.row_stride *= step;
  tensor.column_stride *= step;
  return tensor;
}

// Largest dilation that is split into calls of dilation 1, which are its square.
constexpr int64_t kMostSplitDilation = 4;

// The call of dilation 1, on every dilation-th row and column, which computes these outputs of one
// of stride 1: pixels of other residues do not meet.
template <typename T>
Arguments<T> residue_of(Arguments<T> a, int64_t row, int64_t column) {
  Geometry& g = a.geometry;
  const int64_t step = g.dilation;
  g.out_height = g.height = ceil_div(g.height - row, step);
  g.out_width = g.width = ceil_div(g.width - column, step);
  g.dilation = 1;
  a.grad = pixels_of(a.grad, row, column, step);
  a.result = pixels_of(a.result, row, column, step);
  a.features = pixels_of(a.features, row, column, step);
  a.spatial_filter = pixels_of(a.spatial_filter, row, column, step);
  return a;
}

// The launch of a kernel whose blocks have tiles of pixels of an image, and channels.
template <typename Grid>
struct TiledLaunch {
  Grid grid;
  int64_t tiles, block_channels, blocks;
};

// Whether channels are aligned, and the call is one of dilation 1 or can be split into such calls.
template <typename T>
bool has_residues(const Arguments<T>& a) {
  const Geometry& g = a.geometry;
  return g.group_channels % kQuadChannels == 0 && has_aligned_channels(a.grad) &&
         has_aligned_channels(a.features) && g.dilation <= kMostSplitDilation &&
         (g.dilation == 1 || g.stride == 1);
}

// Calls launch_partials(call, partials, launch_of(geometry)) for the calls of dilation 1 that
// compute this one, and reduces the partial sums; returns false if a launch would be too large.
template <typename T, typename Allocate, typename Launch, typename LaunchOf,
          typename LaunchPartials>
bool launch_residues(const Arguments<T>& a, const Gradients<T>& to, Allocate&& allocate,
                     Launch&& launch, LaunchOf&& launch_of, LaunchPartials&& launch_partials) {
  const Geometry& g = a.geometry;
  const int64_t step = g.dilation;
  const auto for_each_residue = [&](auto&& run) {
    for (int64_t row = 0; row < std::min(step, g.height); ++row) {
      for (int64_t column = 0; column < std::min(step, g.width); ++column) {
        run(step == 1 ? a : residue_of(a, row, column), row, column);
      }
    }
  };
  int64_t tiles = 0;
  bool fits = true;
  for_each_residue([&](const Arguments<T>& call, int64_t, int64_t) {
    const auto of = launch_of(call.geometry);
    tiles += of.tiles;
    fits = fits && of.blocks <= kMaxBlocks && g.batch * g.groups * of.tiles <= kMaxBlocks;
  });
  if (!fits) return false;
  const int64_t channel_values = g.batch * g.channels * g.taps();
  float* const channel_partials = channel_partials_of(g, to.channel_filter, tiles, allocate);
  int64_t before = 0;  // tiles
  for_each_residue([&](const Arguments<T>& call, int64_t row, int64_t column) {
    const auto of = launch_of(call.geometry);
    PartialSums<T> partials{};
    partials.tiles = of.tiles;
    partials.block_channels = of.block_channels;
    partials.channel_blocks = ceil_div(g.group_channels, of.block_channels);
    if (channel_partials != nullptr) {
      partials.channel_partials = channel_partials + before * channel_values;
    }
    set_spatial(partials, call.geometry, pixels_of(to.spatial_filter, row, column, step), allocate);
    launch_partials(call, partials, of);
    before += of.tiles;
    // With the last call, grad_channel is complete.
    const bool is_last = before == tiles;
    launch_reductions(
        channel_reduction(g, to.channel_filter, is_last ? channel_partials : nullptr, tiles),
        spatial_reduction(call.geometry, partials), launch);
  });
  return true;
}

// Runs grad_filters_channels_last if it supports the call; returns whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_grad_filters_channels_last(const Arguments<T>& a, const Gradients<T>& to,
                                       Allocate&& allocate, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    if (!has_residues(a)) return false;
    Geometry dense = a.geometry;
    dense.dilation = 1;
    return with_kernel_size(dense, [&](auto kernel_size, auto stride) {
      constexpr int kKernel = decltype(kernel_size)::value;
      constexpr int kStride = decltype(stride)::value;
      const auto kernel = with_combine(a.combine, [](auto combine) {
        return DDF_HANDLE(grad_filters_channels_last<T, kKernel, kStride, decltype(combine)>);
      });
      const auto launch_of = [](const Geometry& g) {
        TiledLaunch<TileGrid> of;
        of.grid = tile_grid_of(g, kTileOutputColumns);
        of.tiles = of.grid.per_row * of.grid.rows;
        of.block_channels = of.grid.lanes * kQuadChannels;
        const int64_t tiles = ceil_div(of.tiles, kLanes / of.grid.lanes);
        of.blocks = ceil_div(g.batch * g.groups * tiles, tile_warps(kKernel)) *
                    ceil_div(g.group_channels, of.block_channels);
        return of;
      };
      return launch_residues(
          a, to, allocate, launch, launch_of,
          [&](const Arguments<T>& call, const PartialSums<T>& partials, const auto& of) {
            launch("ddf grad_filters, channels_last", kernel, of.blocks,
                   grad_filters_channels_last_threads(kKernel),
                   sizeof(float) * grad_filters_channels_last_shared_floats(kKernel), call,
                   partials, of.grid);
          });
    });
  }
}

// The tiling depends on the shape only, never on the device, and so does the order of sums.
inline TiledLaunch<PairGrid> pair_launch_of(const Geometry& g) {
  TiledLaunch<PairGrid> of;
  PairGrid& grid = of.grid;
  const TileGrid columns = tile_grid_of(g, kPairTileColumns);
  grid.per_row = columns.per_row, grid.columns = columns.columns, grid.lanes = columns.lanes;
  // The most warps that divide the channels without leaving some without channels.
  const int64_t warps = ceil_div(g.group_channels / kQuadChannels, grid.lanes);
  grid.channel_warps = warps % 4 == 0 ? 4 : warps % 2 == 0 ? 2 : 1;
  of.block_channels = grid.channel_warps * grid.lanes * kQuadChannels;
  const int64_t strips = kBackwardWarps / grid.channel_warps * (kLanes / grid.lanes);
  const int64_t pairs = ceil_div(g.height, kPairRows);
  // Higher tiles have fewer partial sums; lower ones give more blocks, and a large GPU needs
  // several for each of its about 130 multiprocessors.
  int64_t most = kMostPairs;
  for (;;) {
    const int64_t per_column = ceil_div(pairs, most);
    grid.pairs = ceil_div(pairs, per_column);
    of.tiles = grid.per_row * per_column;
    of.blocks = ceil_div(g.batch * g.groups * of.tiles, strips) * (warps / grid.channel_warps);
    if (of.blocks >= (most > 2 ? 1024 : 256) || most == 1) return of;
    most /= 2;
  }
}

// Runs backward_3x3_channels_last if it supports the call; returns whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_backward_3x3_channels_last(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate,
                                       Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    a.result = to.features;
    const bool fits = a.geometry.kernel == 3 && a.geometry.stride == 1 && has_residues(a) &&
                      (a.result.data == nullptr || has_aligned_channels(a.result));
    if (!fits) return false;
    const auto kernel = with_combine(a.combine, [](auto combine) {
      return DDF_HANDLE(backward_3x3_channels_last<T, decltype(combine)>);
    });
    return launch_residues(
        a, to, allocate, launch, pair_launch_of,
        [&](const Arguments<T>& call, const PartialSums<T>& partials, const auto& of) {
          const int floats = pair_shared_floats<T>(of.grid);
          launch("ddf backward, 3x3 channels_last", kernel, of.blocks, kBackwardThreads,
                 sizeof(float) * floats, call, partials, of.grid);
        });
  }
}

template <typename T, typename Allocate, typename Launch>
void launch_grad_filters(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate,
                         Launch&& launch) {
  if (launch_grad_filters_nchw(a, to, allocate, launch)) return;
  if (launch_grad_filters_channels_last(a, to, allocate, launch)) return;
  if (launch_grad_filters_gathered(a, to, allocate, launch)) return;
  const Geometry& g = a.geometry;
  if (to.channel_filter.data != nullptr) {
    a.result = to.channel_filter;
    const int channel_lanes = is_channels_last(a.features) ? kChannelLanes : 1;
    const int64_t blocks = g.batch * ceil_div(g.channels, channel_lanes) * g.kernel * g.kernel;
    launch("ddf grad_channel", DDF_HANDLE(grad_channel_generic<T>), blocks, kGenericThreads,
           sizeof(Accumulate<T>) * kGenericThreads, a, channel_lanes);
  }
  if (to.spatial_filter.data != nullptr) {
    a.result = to.spatial_filter;
    launch_slices(a, "ddf grad_spatial", DDF_HANDLE(grad_spatial_generic<T>),
                  g.groups * g.kernel * g.kernel, g.out_height, g.out_width, launch);
  }
}

// Computes the gradients that are needed. allocate(n) returns scratch memory for n floats, valid
// until the kernels are done.
template <typename T, typename Allocate, typename Launch>
void launch_backward(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate, Launch&& launch) {
  const bool needs_filters = to.channel_filter.data != nullptr || to.spatial_filter.data != nullptr;
  const bool needs_features = to.features.data != nullptr;
  if (needs_filters && needs_features && launch_backward_3x3(a, to, allocate, launch)) return;
  if (needs_filters && launch_backward_3x3_channels_last(a, to, allocate, launch)) return;
  if (needs_features) {
    a.result = to.features;
    launch_grad_features(a, launch);
  }
  if (needs_filters) launch_grad_filters(a, to, allocate, launch);
}

}  // namespace ddf::cuda
