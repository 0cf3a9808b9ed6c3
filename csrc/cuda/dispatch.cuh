// Which kernel serves a call, and with how many blocks. `launch(name, kernel, blocks, threads,
// shared_bytes, arguments...)` starts a kernel: on a device in launcher.cuh, on the host in the
// tests.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "backward_3x3.cuh"
#include "filter_norm.cuh"
#include "forward_3x3.cuh"
#include "forward_3x3_channels_last.cuh"
#include "forward_tiled.cuh"
#include "generic.cuh"
#include "grad_filters.cuh"
#include "grad_filters_channels_last.cuh"

namespace ddf::cuda {

// The choice depends on the shape alone, never on the device: so do the sums' orders.
inline Tiling tiling_of(const Geometry& g) {
  Tiling tiling;
  tiling.tiles_per_row = ceil_div(g.width, kTileColumns);
  tiling.tiles = tiling.tiles_per_row * ceil_div(g.height, kTileRows);
  tiling.tile_lanes = 8;
  while (tiling.tile_lanes < tiling.tiles && tiling.tile_lanes < kWindowThreads) {
    tiling.tile_lanes *= 2;
  }
  // A larger slab reads the spatial filter less often; a smaller one makes more blocks, and a
  // large GPU wants several for each of its 130 or so multiprocessors.
  const int64_t lanes = kWindowThreads / tiling.tile_lanes;
  const int64_t tile_blocks = ceil_div(tiling.tiles, tiling.tile_lanes);
  int64_t slab = 32 * lanes;
  while (slab > 4 * lanes &&
         g.batch * tile_blocks * g.groups * ceil_div(g.group_channels, slab) < 1024) {
    slab /= 2;
  }
  tiling.slab = slab < g.group_channels ? slab : g.group_channels;
  tiling.slabs_per_group = ceil_div(g.group_channels, tiling.slab);
  return tiling;
}

inline int64_t blocks_of(const Geometry& g, const Tiling& tiling) {
  return g.batch * ceil_div(tiling.tiles, tiling.tile_lanes) * g.groups * tiling.slabs_per_group;
}

// Whether groups of four along the dimension of stride 1 are aligned, given the other strides.
template <typename T>
bool aligned_by_four(const View<T>& tensor, std::initializer_list<int64_t> strides) {
  return reinterpret_cast<uintptr_t>(tensor.data) % (4 * sizeof(T)) == 0 &&
         std::all_of(strides.begin(), strides.end(), [](int64_t s) { return s % 4 == 0; });
}

template <typename T>
bool reads_by_four(const View<T>& tensor) {
  return aligned_by_four(tensor, {tensor.batch_stride, tensor.channel_stride, tensor.row_stride});
}

template <typename T>
bool reads_channels_by_four(const View<T>& tensor) {
  return tensor.channel_stride == 1 &&
         aligned_by_four(tensor, {tensor.batch_stride, tensor.row_stride, tensor.column_stride});
}

template <int Value>
using Constant = std::integral_constant<int, Value>;

// Calls function(kernel, stride) with the windows of the call as constants, if there are kernels
// compiled for them; says whether it and the function did.
template <typename Function>
bool with_windows(const Geometry& g, Function&& function) {
  if (g.dilation != 1) return false;
  if (g.kernel == 3 && g.stride == 1) return function(Constant<3>{}, Constant<1>{});
  if (g.kernel == 3 && g.stride == 2) return function(Constant<3>{}, Constant<2>{});
  if (g.kernel == 5 && g.stride == 1) return function(Constant<5>{}, Constant<1>{});
  if (g.kernel == 7 && g.stride == 1) return function(Constant<7>{}, Constant<1>{});
  return false;
}

// Whether the kernels for 3 x 3 windows of stride 1 serve these.
inline bool has_3x3_windows(const Geometry& g) {
  return g.kernel == 3 && g.dilation == 1 && g.stride == 1;
}

// Whether rows are contiguous; those of a tensor that is not there do not matter.
template <typename T>
bool has_rows(const View<T>& tensor) {
  return tensor.data == nullptr || tensor.column_stride == 1;
}

// Runs window3 where it serves the call; says whether it did.
template <bool Mirrored, bool Pack, typename T, typename Launch>
bool launch_window3(const Arguments<T>& a, const char* name, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const View<const T>& input = Mirrored ? a.grad : a.features;
    const bool fits =
        has_3x3_windows(g) && has_rows(input) && has_rows(a.spatial_filter) && has_rows(a.result);
    if (!fits) return false;
    const Tiling tiling = tiling_of(g);
    const int64_t blocks = blocks_of(g, tiling);
    if (blocks > kMaxBlocks) return false;
    const bool vector = g.width % 4 == 0 && reads_by_four(input) && reads_by_four(a.result) &&
                        (Mirrored || reads_by_four(a.spatial_filter));
    const size_t shared = sizeof(float) * kTapStride * tiling.slab;
    const auto kernel = a.mul ? (vector ? window3<T, true, Mirrored, true, Pack>
                                        : window3<T, true, Mirrored, false, Pack>)
                              : (vector ? window3<T, false, Mirrored, true, Pack>
                                        : window3<T, false, Mirrored, false, Pack>);
    launch(name, kernel, blocks, kWindowThreads, shared, a, tiling);
    return true;
  }
}

inline Strips strips_of(const Geometry& g) {
  Strips strips;
  strips.per_row = ceil_div(g.width, kStripColumns);
  strips.columns = ceil_div(g.width, strips.per_row);
  strips.rows = ceil_div(g.height, kStripRows);
  const int64_t quads = g.group_channels / kStripChannels;
  strips.chunks = ceil_div(quads, kStripThreads);
  strips.lanes = ceil_div(quads, strips.chunks);
  // Narrow groups leave threads over: shared memory has no room for the strips of all.
  strips.per_block = std::min(kStripThreads / strips.lanes, 16);
  return strips;
}

// Runs window3_channels_last where it serves the call; says whether it did.
template <bool Mirrored, bool Pack, typename T, typename Launch>
bool launch_window3_channels_last(const Arguments<T>& a, const char* name, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const bool fits = has_3x3_windows(g) && g.group_channels % kStripChannels == 0 &&
                      reads_channels_by_four(Mirrored ? a.grad : a.features) &&
                      reads_channels_by_four(a.result);
    if (!fits) return false;
    const Strips strips = strips_of(g);
    const int64_t count = g.batch * g.groups * strips.per_row * strips.rows;
    const int64_t blocks = ceil_div(count, strips.per_block) * strips.chunks;
    if (blocks > kMaxBlocks) return false;
    const auto kernel = a.mul ? window3_channels_last<T, true, Mirrored, Pack>
                              : window3_channels_last<T, false, Mirrored, Pack>;
    launch(name, kernel, blocks, kStripThreads, sizeof(float) * kStripFloats * strips.per_block, a,
           strips);
    return true;
  }
}

// Runs window_quads where it serves the call; says whether it did.
template <bool Mirrored, bool Pack, typename T, typename Launch>
bool launch_window_quads(const Arguments<T>& a, const char* name, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    const View<const T>& input = Mirrored ? a.grad : a.features;
    const bool rows = has_rows(input) && has_rows(a.result);
    const bool quads = g.group_channels % kWindowChannels == 0 && reads_channels_by_four(input) &&
                       reads_channels_by_four(a.result);
    if (!rows && !quads) return false;
    return with_windows(g, [&](auto kernel_size, auto stride) {
      constexpr int kKernel = decltype(kernel_size)::value;
      constexpr int kStride = decltype(stride)::value;
      if constexpr ((kKernel == 3 && kStride == 1) || (Mirrored && kStride != 1)) {
        return false;
      } else {
        const int tiles = ceil_div(g.out_height * ceil_div(g.out_width, kQuadOutputs), kBlockQuads);
        const int slabs = ceil_div(g.group_channels, kBlockChannels);
        const int64_t blocks = g.batch * g.groups * tiles * slabs;
        if (blocks > kMaxBlocks) return false;
        const bool vector = g.width % 4 == 0 && g.out_width % 4 == 0 && reads_by_four(input) &&
                            reads_by_four(a.result);
        const auto kernel =
            a.mul ? (rows ? window_quads<T, kKernel, kStride, true, Mirrored, false, Pack>
                          : window_quads<T, kKernel, kStride, true, Mirrored, true, Pack>)
                  : (rows ? window_quads<T, kKernel, kStride, false, Mirrored, false, Pack>
                          : window_quads<T, kKernel, kStride, false, Mirrored, true, Pack>);
        launch(name, kernel, blocks, kQuadThreads, sizeof(float) * window_quads_floats(kKernel), a,
               tiles, slabs, vector);
        return true;
      }
    });
  }
}

template <typename T, typename Launch>
void launch_forward_generic(const Arguments<T>& a, const char* name, Launch&& launch) {
  const Geometry& g = a.geometry;
  launch_boxes(a, name, forward_generic<T>, g.channels, g.out_height, g.out_width, launch);
}

template <typename T, typename Launch>
void launch_forward(const Arguments<T>& a, Launch&& launch) {
  if (launch_window3<false, false>(a, "ddf forward, 3x3", launch)) return;
  if (launch_window3_channels_last<false, false>(a, "ddf forward, 3x3 channels_last", launch)) {
    return;
  }
  if (launch_window_quads<false, false>(a, "ddf forward, quads", launch)) return;
  launch_forward_generic(a, "ddf forward", launch);
}

// ddf with what a.around says. The channel filter is contiguous, the spatial filter too or
// channels_last. allocate(n) makes room for n elements that lives until the kernels are done: where
// no kernel normalizes the filters itself, they go through memory.
template <typename T, typename Allocate, typename Launch>
void launch_pack(Arguments<T> a, Allocate&& allocate, Launch&& launch) {
  if (launch_window3<false, true>(a, "ddf_pack, 3x3", launch)) return;
  if (launch_window3_channels_last<false, true>(a, "ddf_pack, 3x3 channels_last", launch)) return;
  if (launch_window_quads<false, true>(a, "ddf_pack, quads", launch)) return;
  const Geometry& g = a.geometry;
  const auto normalize = [&](View<const T>& filter, int64_t filters, int64_t pixels,
                             bool taps_inner, Accumulate<T> scale, const Accumulate<T>* std) {
    NormArguments<T> norm{};
    norm.batch = g.batch;
    norm.filters = filters;
    norm.taps = g.taps();
    norm.pixels = pixels;
    norm.taps_inner = taps_inner;
    norm.x = filter.data;
    norm.std = std;
    norm.scale = scale;
    norm.eps = a.around.eps;
    norm.result = allocate(g.batch * filters * g.taps() * pixels);
    launch_norm(norm, launch);
    filter.data = norm.result;
  };
  normalize(a.channel_filter, g.channels, 1, true, a.around.channel_scale, a.around.channel_std);
  normalize(a.spatial_filter, g.groups, g.out_height * g.out_width,
            a.spatial_filter.channel_stride == 1, a.around.spatial_scale, nullptr);
  launch_forward_generic(a, "ddf_pack", launch);
}

template <typename T, typename Launch>
void launch_grad_features(const Arguments<T>& a, Launch&& launch) {
  if (launch_window3<true, false>(a, "ddf grad_features, 3x3", launch)) return;
  if (launch_window3_channels_last<true, false>(a, "ddf grad_features, 3x3 channels_last",
                                                launch)) {
    return;
  }
  if (launch_window_quads<true, false>(a, "ddf grad_features, quads", launch)) return;
  const Geometry& g = a.geometry;
  launch_boxes(a, "ddf grad_features", grad_features_generic<T>, g.channels, g.height, g.width,
               launch);
}

// Splits the channels of a group when there would be too few blocks for a large GPU.
template <typename T>
void split_channels(FilterSums<T>& filters, const Geometry& g, int64_t most) {
  int64_t slab = std::min(g.group_channels, most);
  const auto blocks = [&] {
    return g.batch * g.groups * filters.tiles * ceil_div(g.group_channels, slab);
  };
  while (slab > 64 && blocks() < 512) slab = ceil_div(slab, 2);
  filters.slab = slab;
  filters.splits = ceil_div(g.group_channels, slab);
}

// Makes room for the parts, calls launch_parts(filters), and adds the parts.
template <typename T, typename Allocate, typename Launch, typename LaunchParts>
void launch_sums(FilterSums<T> filters, const Geometry& g, const Gradients<T>& to,
                 Allocate&& allocate, Launch&& launch, LaunchParts&& launch_parts) {
  const int64_t taps = g.kernel * g.kernel;
  const int64_t channel_values = g.batch * g.channels * taps;
  const int64_t spatial_values = g.batch * g.groups * taps * g.out_height * g.out_width;
  filters.channel_parts =
      to.channel_filter.data == nullptr ? nullptr : allocate(filters.tiles * channel_values);
  filters.grad_spatial = to.spatial_filter;
  filters.spatial_parts = nullptr;
  if (filters.splits > 1 && to.spatial_filter.data != nullptr) {
    filters.spatial_parts = allocate(filters.splits * spatial_values);
  }
  launch_parts(filters);
  const auto sum = [&](const char* name, const View<T>& result, const float* parts, int64_t values,
                       int64_t channels, int64_t rows, int64_t columns, int count) {
    if (parts == nullptr) return;
    launch(name, sum_parts<T>, ceil_div(values, kLanes), kSumThreads, sizeof(float) * kSumThreads,
           result, parts, values, static_cast<int>(channels), static_cast<int>(rows),
           static_cast<int>(columns), count);
  };
  sum("ddf grad_channel, sum of parts", to.channel_filter, filters.channel_parts, channel_values,
      g.channels, g.kernel, g.kernel, filters.tiles);
  sum("ddf grad_spatial, sum of parts", to.spatial_filter, filters.spatial_parts, spatial_values,
      g.groups * taps, g.out_height, g.out_width, filters.splits);
}

// Runs backward3 where it serves the call; says whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_backward3(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate,
                      Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    a.result = to.features;
    const bool fits =
        has_3x3_windows(g) && has_rows(a.grad) && has_rows(a.features) && has_rows(a.result);
    if (!fits) return false;
    FilterSums<T> filters{};
    filters.tiles =
        ceil_div(ceil_div(g.height, kBackwardRows) * ceil_div(g.width, kBackwardColumns), kLanes);
    split_channels(filters, g, kBackwardSlab);
    const int64_t blocks = g.batch * g.groups * filters.tiles * filters.splits;
    if (blocks > kMaxBlocks) return false;
    const bool vector = g.width % 4 == 0 && reads_by_four(a.grad) && reads_by_four(a.features) &&
                        reads_by_four(a.result);
    const size_t shared =
        sizeof(float) * std::max(kBackwardTapStride * filters.slab, kBackwardSumFloats);
    const auto kernel = a.mul ? (vector ? backward3<T, true, true> : backward3<T, true, false>)
                              : (vector ? backward3<T, false, true> : backward3<T, false, false>);
    launch_sums(filters, g, to, allocate, launch, [&](const FilterSums<T>& ready) {
      launch("ddf backward, 3x3", kernel, blocks, kBackwardThreads, shared, a, ready);
    });
    return true;
  }
}

// Runs filter_grads where it serves the call; says whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_filter_grads_of_rows(const Arguments<T>& a, const Gradients<T>& to, Allocate&& allocate,
                                 Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    if (!has_rows(a.grad) || !has_rows(a.features) || !has_rows(a.spatial_filter)) return false;
    return with_windows(g, [&](auto kernel_size, auto stride) {
      constexpr int kKernel = decltype(kernel_size)::value;
      constexpr int kStride = decltype(stride)::value;
      FilterSums<T> filters{};
      filters.tiles = ceil_div(g.out_height * ceil_div(g.out_width, kLaneOutputs), kLanes);
      split_channels(filters, g, g.group_channels);
      const int64_t blocks = g.batch * g.groups * filters.tiles * filters.splits;
      if (blocks > kMaxBlocks) return false;
      const bool vector = g.width % 4 == 0 && g.out_width % 4 == 0 && reads_by_four(a.features) &&
                          reads_by_four(a.grad) && reads_by_four(a.spatial_filter);
      const auto kernel = a.mul ? (vector ? filter_grads<T, kKernel, kStride, true, true>
                                          : filter_grads<T, kKernel, kStride, true, false>)
                                : (vector ? filter_grads<T, kKernel, kStride, false, true>
                                          : filter_grads<T, kKernel, kStride, false, false>);
      launch_sums(filters, g, to, allocate, launch, [&](const FilterSums<T>& ready) {
        launch("ddf filter gradients", kernel, blocks, filter_threads(kKernel),
               sizeof(float) * filter_shared_floats(kKernel), a, ready);
      });
      return true;
    });
  }
}

// Runs filter_grads_channels_last where it serves the call; says whether it did.
template <typename T, typename Allocate, typename Launch>
bool launch_filter_grads_channels_last(const Arguments<T>& a, const Gradients<T>& to,
                                       Allocate&& allocate, Launch&& launch) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    const Geometry& g = a.geometry;
    if (g.group_channels % kQuadChannels != 0 || !reads_channels_by_four(a.grad) ||
        !reads_channels_by_four(a.features)) {
      return false;
    }
    return with_windows(g, [&](auto kernel_size, auto stride) {
      constexpr int kKernel = decltype(kernel_size)::value;
      constexpr int kStride = decltype(stride)::value;
      Quads quads;
      quads.per_row = ceil_div(g.out_width, kTileOutputColumns);
      quads.columns = ceil_div(g.out_width, quads.per_row);
      quads.rows = ceil_div(g.out_height, kTileOutputRows);
      const int64_t count = g.group_channels / kQuadChannels;
      // The widest that leaves the fewest lanes without channels.
      quads.lanes = kLanes;
      for (const int lanes : {16, 8}) {
        if (ceil_div(count, lanes) * lanes < ceil_div(count, quads.lanes) * quads.lanes) {
          quads.lanes = lanes;
        }
      }
      FilterSums<T> filters{};
      filters.tiles = quads.per_row * quads.rows;
      filters.slab = quads.lanes * kQuadChannels;
      filters.splits = ceil_div(count, quads.lanes);
      const int64_t warps = g.batch * g.groups * ceil_div(filters.tiles, kLanes / quads.lanes);
      const int64_t blocks = ceil_div(warps, tile_warps(kKernel)) * filters.splits;
      if (blocks > kMaxBlocks) return false;
      const auto kernel = a.mul ? filter_grads_channels_last<T, kKernel, kStride, true>
                                : filter_grads_channels_last<T, kKernel, kStride, false>;
      launch_sums(filters, g, to, allocate, launch, [&](const FilterSums<T>& ready) {
        launch("ddf filter gradients, channels_last", kernel, blocks, quad_threads(kKernel),
               sizeof(float) * quad_shared_floats(kKernel), a, ready, quads);
      });
      return true;
    });
  }
}

template <typename T, typename Allocate, typename Launch>
void launch_filter_grads(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate,
                         Launch&& launch) {
  if (launch_filter_grads_of_rows(a, to, allocate, launch)) return;
  if (launch_filter_grads_channels_last(a, to, allocate, launch)) return;
  const Geometry& g = a.geometry;
  if (to.channel_filter.data != nullptr) {
    a.result = to.channel_filter;
    const int channel_lanes = is_channels_last(a.features) ? kChannelLanes : 1;
    const int64_t blocks = g.batch * ceil_div(g.channels, channel_lanes) * g.kernel * g.kernel;
    launch("ddf grad_channel", grad_channel_generic<T>, blocks, kGenericThreads,
           sizeof(Accumulate<T>) * kGenericThreads, a, channel_lanes);
  }
  if (to.spatial_filter.data != nullptr) {
    a.result = to.spatial_filter;
    launch_boxes(a, "ddf grad_spatial", grad_spatial_generic<T>, g.groups * g.kernel * g.kernel,
                 g.out_height, g.out_width, launch);
  }
}

// Fills the gradients that are wanted. allocate(n) makes room for n floats that lives until the
// kernels are done.
template <typename T, typename Allocate, typename Launch>
void launch_backward(Arguments<T> a, const Gradients<T>& to, Allocate&& allocate, Launch&& launch) {
  const bool wants_filters = to.channel_filter.data != nullptr || to.spatial_filter.data != nullptr;
  if (to.features.data != nullptr) {
    if (wants_filters && launch_backward3(a, to, allocate, launch)) return;
    a.result = to.features;
    launch_grad_features(a, launch);
  }
  if (wants_filters) launch_filter_grads(a, to, allocate, launch);
}

}  // namespace ddf::cuda
