// All CPU kernels for the instruction set DDF_ISA, whose vectors have DDF_VECTOR_BYTES; included
// once by each kernels_*.cpp.
#pragma once
#include "cpu/channels_last.h"
#include "cpu/filter_norm.h"
#include "cpu/nchw.h"

namespace ddf::cpu {
namespace DDF_ISA {
namespace {

template <class T, class Combine>
void forward_as(const Forward& f, ParallelFor run) {
  if (f.channels_last)
    forward_channels_last<T, Combine>(f, run);
  else
    forward_nchw<T, Combine>(f, run);
}

template <class T, class Combine>
void backward_as(const Backward& b, ParallelFor run) {
  if (b.grad_features) {
    if (b.channels_last)
      grad_features_channels_last<T, Combine>(b, run);
    else
      grad_features_nchw<T, Combine>(b, run);
  }
  if (b.grad_channel || b.grad_spatial) {
    if (b.channels_last)
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
