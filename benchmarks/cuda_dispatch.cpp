// A library for ctypes that tells which kernels a call starts, without running them: the kernels
// are known by name only. With DDF_BANKS it also runs the first and the last block of each, for the
// bank conflicts (banks/cuda_on_host.h).
#if !defined(DDF_BANKS)
#define DDF_KERNELS_BY_NAME
#endif
#include <dlfcn.h>

#include <sstream>

#include "dispatch.cuh"

namespace {

using namespace ddf::cuda;
using ddf::Geometry;

std::ostringstream launches;
int64_t scratch_floats = 0;  // allocated since the last launch

double fraction(int64_t used, int64_t all) { return static_cast<double>(used) / all; }

// Fraction of a launch's threads that have work, for the kernels that divide it among lanes.
template <typename... Given>
double active_lanes(const std::string&, const Given&...) {
  return 1;
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>&, const Tiling& tiling) {
  const int64_t blocks = ceil_div(tiling.tiles, tiling.tile_lanes);
  return fraction(tiling.tiles, blocks * tiling.tile_lanes);
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>& a, const StripGrid& grid) {
  const Geometry& g = a.geometry;
  const int64_t strips = g.batch * g.groups * grid.per_row * grid.rows;
  const int64_t blocks = ceil_div(strips, grid.per_block);
  return fraction(grid.per_block * grid.lanes, kStripThreads) *
         fraction(strips, blocks * grid.per_block) *
         fraction(g.group_channels / kStripChannels, grid.channel_blocks * grid.lanes);
}
template <typename T>
double active_lanes(const std::string& kernel, const Arguments<T>& a,
                    const PartialSums<T>& partials) {
  const Geometry& g = a.geometry;
  if (kernel.find("gathered") == std::string::npos) return 1;
  return fraction(g.out_height * g.out_width, int64_t{partials.tiles} * kGatheredTile);
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>& a, const PartialSums<T>& partials,
                    int lanes) {
  const Geometry& g = a.geometry;
  const int64_t quads = ceil_div(g.height, kBackwardRows) * ceil_div(g.width, kBackwardColumns);
  return fraction(quads, int64_t{partials.tiles} * lanes);
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>& a, const PartialSums<T>&,
                    const QuadGrid& grid, bool) {
  const Geometry& g = a.geometry;
  return fraction(g.out_height * ceil_div(g.out_width, kQuadOutputs), grid.tiles * kTileQuads);
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>& a, const QuadGrid& grid, int, bool) {
  const Geometry& g = a.geometry;
  const int64_t lanes = kTiledThreads / kTileQuads,
                quads = ceil_div(g.group_channels, kThreadChannels);
  return fraction(g.out_height * ceil_div(g.out_width, kQuadOutputs), grid.tiles * kTileQuads) *
         fraction(quads, ceil_div(quads, lanes) * lanes);
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>& a, const PartialSums<T>& partials,
                    const TileGrid& grid) {
  return fraction(a.geometry.group_channels / kQuadChannels,
                  int64_t{partials.channel_blocks} * grid.lanes);
}
template <typename T>
double active_lanes(const std::string&, const Arguments<T>& a, const PartialSums<T>& partials,
                    const PairGrid& grid) {
  const Geometry& g = a.geometry;
  const int64_t tile_warps = kBackwardWarps / grid.channel_warps, strips = kLanes / grid.lanes;
  const int64_t tiles = g.batch * g.groups * partials.tiles;
  const int64_t steps = grid.columns * kPairRows * grid.pairs;
  return fraction(g.height * g.width, partials.tiles * steps) *
         fraction(tiles, ceil_div(tiles, tile_warps * strips) * tile_warps * strips) *
         fraction(g.group_channels / kQuadChannels,
                  int64_t{partials.channel_blocks} * grid.channel_warps * grid.lanes);
}
template <typename T>
double active_lanes(const std::string& kernel, const Arguments<T>& a, const GatherGrid& grid,
                    const SubpixelStrides&) {
  const Geometry& g = a.geometry;
  const bool mirrored = kernel.find("true") != std::string::npos;
  const int64_t rows = mirrored ? g.height : g.out_height;
  const int64_t columns = mirrored ? g.width : g.out_width;
  if (grid.lanes == 0) return fraction(rows * columns, int64_t{grid.tiles} * kGatherThreads);
  const int64_t strips = kGatherThreads / grid.lanes;
  return fraction(strips * grid.lanes, kGatherThreads) *
         fraction(rows * ceil_div(columns, kGatherPixels), grid.tiles * strips) *
         fraction(g.group_channels / kGatherQuad, int64_t{grid.channel_blocks} * grid.lanes);
}

struct Launch {
  template <typename... Parameters, typename... Given>
  void operator()(const char*, const Handle<Parameters...>& kernel, int64_t blocks, int threads,
                  size_t shared_bytes, const Given&... given) const {
    launches << *kernel.name << '\t' << blocks << '\t' << threads << '\t' << shared_bytes << '\t'
             << active_lanes(*kernel.name, given...) << '\t' << scratch_floats;
    scratch_floats = 0;
#if defined(DDF_BANKS)
    auto& recorder = ddf::banks::recorder;
    recorder.patterns.clear();
    for (const int64_t block : {int64_t{0}, blocks - 1}) {
      recorder.run([&] { kernel.compiled(given...); }, block, threads, shared_bytes);
    }
    for (const auto& [address, pattern] : recorder.patterns) {
      // As addr2line takes it, of the call that returns there.
      Dl_info info;
      dladdr(address, &info);
      const auto offset =
          static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase) - 1;
      launches << '\t' << offset << ' ' << pattern.requests << ' ' << pattern.wavefronts << ' '
               << pattern.least << ' ' << pattern.worst;
    }
#endif
    launches << '\n';
  }
};

// A tensor of this size; its memory is never accessed.
template <typename T>
View<T> tensor(int64_t channels, int64_t rows, int64_t columns, bool channels_last) {
  alignas(16) static std::remove_const_t<T> memory[16];
  const int64_t image = channels * rows * columns;
  return channels_last ? View<T>{memory, image, 1, columns * channels, channels}
                       : View<T>{memory, image, rows * columns, columns, 1};
}

template <typename T>
void dispatch(const std::string& pass, const ddf::Geometry& g, ddf::CombineMode combine,
              bool channels_last) {
  Arguments<T> a{};
  a.geometry = g;
  a.combine = combine;
  const int64_t out_rows = g.scale * g.out_height, out_columns = g.scale * g.out_width;
  const int64_t filter_planes = g.groups * g.taps();
  a.features = tensor<const T>(g.channels, g.height, g.width, channels_last);
  a.grad = tensor<const T>(g.channels, out_rows, out_columns, channels_last);
  a.channel_filter = tensor<const T>(g.channels * g.subpixels(), g.kernel, g.kernel, false);
  // Filters of ddf_up are contiguous.
  a.spatial_filter = tensor<const T>(filter_planes * g.subpixels(), g.out_height, g.out_width,
                                     channels_last && g.scale == 1);
  const Gradients<T> to{tensor<T>(g.channels, g.height, g.width, channels_last),
                        tensor<T>(g.channels * g.subpixels(), g.kernel, g.kernel, false),
                        tensor<T>(filter_planes * g.subpixels(), g.out_height, g.out_width,
                                  channels_last && g.scale == 1)};
  const auto out = tensor<T>(g.channels, out_rows, out_columns, channels_last);
  const auto scratch = [&](int64_t) { return const_cast<T*>(a.features.data); };
  const auto floats = [](int64_t count) {
    static float memory;
    scratch_floats += count;
    return &memory;
  };
  const SubpixelStrides strides{g.channels * g.taps(), filter_planes * g.out_height * g.out_width};
  if (pass == "forward") {
    a.result = out;
    launch_forward(a, Launch{});
  } else if (pass == "pack") {
    a.result = out;
    launch_pack(a, scratch, Launch{});
  } else if (pass == "backward") {
    launch_backward(a, to, floats, Launch{});
  } else if (pass == "grad_features") {
    launch_backward(a, Gradients<T>{to.features, {}, {}}, floats, Launch{});
  } else if (pass == "grad_filters") {
    launch_backward(a, Gradients<T>{{}, to.channel_filter, to.spatial_filter}, floats, Launch{});
  } else if (pass == "up forward") {
    a.result = out;
    if (launch_upsample_3x3(a, strides, Launch{})) return;
    for_each_subpixel(a, strides,
                      [](const auto& call, int64_t) { launch_forward(call, Launch{}); });
  } else if (pass == "up backward") {
    a.result = to.features;
    launch_upsample_grad_features(a, strides, Launch{});
    a.result = {};
    for_each_subpixel(a, strides, [&](const auto& call, int64_t r) {
      launch_backward(call, grad_filters_of(to, strides, r), floats, Launch{});
    });
  }
}

}  // namespace

// A line for each launch: the kernel, blocks, threads, bytes of shared memory, active lanes, floats
// of scratch memory that were allocated for it; then
// for each instruction that accesses shared memory its address, the requests of warps, their
// wavefronts, the least of these, and the worst.
extern "C" const char* ddf_dispatch(const char* pass, const char* dtype, const ddf::Geometry* g,
                                    int combine, bool channels_last) {
  static std::string text;
  launches.str("");
  const auto mode = static_cast<ddf::CombineMode>(combine);
  const std::string type = dtype;
  if (type == "float32") dispatch<float>(pass, *g, mode, channels_last);
#if !defined(DDF_BANKS)
  if (type == "bfloat16") dispatch<BFloat16>(pass, *g, mode, channels_last);
#endif
  text = launches.str();
  return text.c_str();
}

// The kernels of these dtypes, one a line.
extern "C" const char* ddf_kernel_names() { return kernel_names().c_str(); }
