// All CPU kernels for the instruction set DDF_ISA, whose vectors have DDF_VECTOR_BYTES; included
// once by each kernels_*.cpp.
#pragma once
#include "cpu/channels_last.h"
#include "cpu/filter_norm.h"
#include "cpu/nchw.h"

namespace ddf::cpu {
namespace DDF_ISA {
namespace {

enum class Pass { forward, grad_features, grad_filters };

// Whether kernels along rows are faster than those along channels for channels_last features. The
// limits were measured on an EPYC with AVX-512, forced to AVX2 as well.
template <class T>
bool is_narrow(const Geometry& g, Pass pass) {
  using A = Accumulate<T>;
  // Without masked loads, channels that do not fill a vector are copied one by one.
  constexpr bool kMasked = DDF_VECTOR_BYTES == 64 || (DDF_VECTOR_BYTES == 32 && sizeof(T) >= 4);
  const int64_t words = g.group_channels * static_cast<int64_t>(sizeof(A)) / 4;
  if (!kMasked && g.group_channels % kLanes<A> && words < 64) return true;
  const auto below = [&](int forward, int grad_features, int grad_filters) {
    return words < (pass == Pass::forward         ? forward
                    : pass == Pass::grad_features ? grad_features
                                                  : grad_filters);
  };
  if (g.kernel == 1) return below(12, 12, 0);
  if (g.kernel > 3) return below(40, 40, 40);
  if (g.dilation > 1 || g.scale > 1) return below(24, 24, 24);
  return g.stride > 1 ? below(8, 20, 10) : below(kLanes<float> == 16 ? 12 : 16, 5, 24);
}

// Whether vectors that span groups are faster for channels_last features than those of one group
// and those along rows.
template <class T>
bool is_spanning(const Geometry& g, const SpatialStrides& strides, bool along_rows) {
  // The taps of a pixel are adjacent, or few enough to be read from planes.
  return spans_groups<Accumulate<T>>(g) && (strides.tap == 1 || g.kernel <= 3) &&
         (along_rows || 2 * g.group_channels <= kLanes<Accumulate<T>>);
}

template <class T, class Combine>
void forward_as(const Forward& f, ParallelFor run) {
  const bool along_rows = is_narrow<T>(f.geometry, Pass::forward);
  const bool spans = is_spanning<T>(f.geometry, f.spatial_strides, along_rows);
  // Only the kernels along rows have a softmax.
  if (f.channels_last && !f.pack.softmax && (spans || !along_rows))
    forward_channels_last<T, Combine>(f, spans, run);
  else
    forward_nchw<T, Combine>(f, run);
}

template <class T, class Combine>
void backward_as(const Backward& b, ParallelFor run) {
  if (b.grad_features) {
    const bool along_rows = is_narrow<T>(b.geometry, Pass::grad_features);
    const bool spans = is_spanning<T>(b.geometry, b.spatial_strides, along_rows);
    if (b.channels_last && (spans || !along_rows))
      grad_features_channels_last<T, Combine>(b, spans, run);
    else
      grad_features_nchw<T, Combine>(b, run);
  }
  if (b.grad_channel || b.grad_spatial) {
    const bool along_rows = is_narrow<T>(b.geometry, Pass::grad_filters);
    // Kernels along rows are nearly as fast for 16-bit types.
    if constexpr (sizeof(T) >= 4)
      if (b.channels_last && along_rows && can_bundle_groups<Accumulate<T>>(b))
        return grad_filters_few_channels<T, Combine>(b, run);
    if (b.channels_last && !along_rows)
      grad_filters_channels_last<T, Combine>(b, run);
    else
      grad_filters_nchw<T, Combine>(b, run);
  }
}

// Calls with(T()) for the elements' type.
template <class F>
void with_type(DType dtype, const F& with) {
  switch (dtype) {
    case DType::f32:
      return with(float());
    case DType::f64:
      return with(double());
    case DType::f16:
      return with(Half());
    case DType::bf16:
      return with(BFloat16());
  }
}

void forward(const Forward& f, ParallelFor run) {
  with_type(f.dtype, [&](auto element) {
    using T = decltype(element);
    with_combine(f.combine, [&](auto combine) { forward_as<T, decltype(combine)>(f, run); });
  });
}
void backward(const Backward& b, ParallelFor run) {
  with_type(b.dtype, [&](auto element) {
    using T = decltype(element);
    with_combine(b.combine, [&](auto combine) { backward_as<T, decltype(combine)>(b, run); });
  });
}
void filter_norm(const FilterNorm& n, ParallelFor run) {
  with_type(n.dtype, [&](auto element) { filter_norm<decltype(element)>(n, run); });
}
void filter_norm_backward(const FilterNormBackward& n, ParallelFor run) {
  with_type(n.dtype, [&](auto element) {
    using T = decltype(element);
    if (n.grad_x) filter_norm_grad_x<T>(n, run);
    if (n.grad_std || n.grad_mean) filter_norm_grad_parameters<T>(n, run);
  });
}

}  // namespace
}  // namespace DDF_ISA

#define DDF_JOIN_(a, b) a##b
#define DDF_JOIN(a, b) DDF_JOIN_(a, b)
extern const Kernels DDF_JOIN(DDF_ISA, _kernels) = {
    DDF_ISA::forward, DDF_ISA::backward, DDF_ISA::filter_norm, DDF_ISA::filter_norm_backward};

}  // namespace ddf::cpu
