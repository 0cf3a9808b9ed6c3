// Arguments of the CPU kernels. No framework includes: a file compiled for one instruction set must
// not contain inline functions that the linker could choose for other files.
#pragma once
#include <cstdint>

#include "geometry.h"

namespace ddf {

// Defined in combine.h.
enum class CombineMode : int;

namespace cpu {

enum class DType { f32, f64, f16, bf16 };

// A spatial filter or its gradient, [B, subpixels, groups * taps, Ho, Wo], with strides in
// elements.
struct SpatialStrides {
  int64_t batch, subpixel, tap, row, column;

  // Where the filters of one of batch * subpixels images start.
  int64_t start(int64_t image, int64_t subpixels) const {
    return image / subpixels * batch + image % subpixels * subpixel;
  }
};

// The geometry of the filter gradients: each subpixel counts as an image.
inline Geometry by_subpixel(Geometry g) {
  g.batch *= g.subpixels();
  return g;
}

// Runs body(begin, end, context) over the items 0..count in torch's thread pool.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t count, Body body, void* context);

// Prologue (FilterNorm of the filters) and epilogue (bias, ReLU) of ddf_pack, and the prologue of
// ddf_softmax; by default none.
struct PackOptions {
  // Whether to apply FilterNorm to the filters.
  bool normalize = false;
  double channel_scale = 1, spatial_scale = 1, eps = 0;
  // In the accumulation type; null if absent.
  const void* channel_std = nullptr;  // [C * taps]
  const void* bias = nullptr;         // [C], added to the output
  bool relu = false;
  // Whether to apply the softmax over the taps to the spatial filter.
  bool softmax = false;
};

struct Forward {
  Geometry geometry;
  DType dtype;
  CombineMode combine;
  bool channels_last;  // features and output
  const void* features;
  // [B, subpixels, C, taps], contiguous; null if absent
  const void* channel_filter;
  const void* spatial_filter;  // null if absent
  SpatialStrides spatial_strides;
  PackOptions pack;
  void* output;
};

struct Backward {
  Geometry geometry;
  DType dtype;
  CombineMode combine;
  bool channels_last;  // features, grad and grad_features
  const void* grad;
  const void* features;
  const void* channel_filter;
  const void* spatial_filter;
  SpatialStrides spatial_strides;
  // Null where a gradient is not needed.
  void* grad_features;
  void* grad_channel;
  void* grad_spatial;
  SpatialStrides grad_spatial_strides;
};

// Filters to normalize: [batch][filters][taps][pixels], or [batch][pixels][filters][taps].
struct FilterNormSizes {
  int64_t batch, filters, taps, pixels;
  bool taps_inner;
};

struct FilterNorm {
  FilterNormSizes sizes;
  DType dtype;
  const void* x;
  // [filters * taps] in the accumulation type; null if absent.
  const void* std;
  const void* mean;
  double scale, eps;
  void* result;
};

struct FilterNormBackward {
  FilterNormSizes sizes;
  DType dtype;
  const void* grad;
  const void* x;
  const void* std;
  double scale, eps;
  // Null where a gradient is not needed.
  void* grad_x;
  void* grad_std;
  void* grad_mean;
};

// The kernels compiled for one instruction set.
struct Kernels {
  void (*forward)(const Forward&, ParallelFor);
  void (*backward)(const Backward&, ParallelFor);
  void (*filter_norm)(const FilterNorm&, ParallelFor);
  void (*filter_norm_backward)(const FilterNormBackward&, ParallelFor);
};

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace cpu
}  // namespace ddf
