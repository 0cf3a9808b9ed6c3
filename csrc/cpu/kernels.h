// All CPU kernels for the instruction set DDF_ISA, whose vectors have DDF_VECTOR_BYTES; included
// once by each kernels_*.cpp.
#pragma once
#include "cpu/pixels.h"
#include "cpu/planes.h"

namespace ddf::cpu {
namespace DDF_ISA {
namespace {

template <class T, class Combine>
void forward_as(const Forward& f, ParallelFor run) {
  if (f.channels_last)
    forward_pixels<T, Combine>(f, run);
  else
    forward_planes<T, Combine>(f, run);
}

template <class T, class Combine>
void backward_as(const Backward& b, ParallelFor run) {
  if (b.grad_features) {
    if (b.channels_last)
      grad_features_pixels<T, Combine>(b, run);
    else
      grad_features_planes<T, Combine>(b, run);
  }
  if (b.grad_channel || b.grad_spatial) {
    if (b.channels_last)
      grad_filters_pixels<T, Combine>(b, run);
    else
      grad_filters_planes<T, Combine>(b, run);
  }
}

template <template <class, class> class Kernel, class Arguments>
void dispatch(const Arguments& arguments, ParallelFor run) {
  const auto with = [&](auto element) {
    using T = decltype(element);
    arguments.mul ? Kernel<T, Mul>::run(arguments, run) : Kernel<T, Add>::run(arguments, run);
  };
  switch (arguments.dtype) {
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

template <class T, class Combine>
struct ForwardKernel {
  static void run(const Forward& f, ParallelFor run) { forward_as<T, Combine>(f, run); }
};
template <class T, class Combine>
struct BackwardKernel {
  static void run(const Backward& b, ParallelFor run) { backward_as<T, Combine>(b, run); }
};

void forward(const Forward& f, ParallelFor run) { dispatch<ForwardKernel>(f, run); }
void backward(const Backward& b, ParallelFor run) { dispatch<BackwardKernel>(b, run); }

}  // namespace
}  // namespace DDF_ISA

#define DDF_JOIN_(a, b) a##b
#define DDF_JOIN(a, b) DDF_JOIN_(a, b)
extern const Kernels DDF_JOIN(DDF_ISA, _kernels) = {DDF_ISA::forward, DDF_ISA::backward};

}  // namespace ddf::cpu
