// Definitions of the functions declared in launcher.cuh, and macros that instantiate them for a
// dtype.
#pragma once
#include "dispatch.cuh"
#include "launcher.cuh"

#define DDF_INSTANTIATE_FORWARD(type)                                                   \
  template void run_forward(const Arguments<type>&, const Stream&);                     \
  template void run_pack(const Arguments<type>&, const Allocate<type>&, const Stream&); \
  template void run_filter_norm(const FilterNormArguments<type>&, const Stream&)
#define DDF_INSTANTIATE_BACKWARD(type)                                                     \
  template void run_backward(const Arguments<type>&, const Gradients<type>&,               \
                             const Allocate<float>&, const Stream&);                       \
  template void run_upsample_grad_features(const Arguments<type>&, const SubpixelStrides&, \
                                           const Stream&);                                 \
  template void run_filter_norm_backward(const FilterNormArguments<type>&, const Stream&)

namespace ddf::cuda {

template <typename T>
void run_forward(const Arguments<T>& a, const Stream& stream) {
  launch_forward(a, Launcher(stream));
}

template <typename T>
void run_pack(const Arguments<T>& a, const Allocate<T>& allocate, const Stream& stream) {
  launch_pack(a, allocate, Launcher(stream));
}

template <typename T>
void run_backward(const Arguments<T>& a, const Gradients<T>& to, const Allocate<float>& allocate,
                  const Stream& stream) {
  launch_backward(a, to, allocate, Launcher(stream));
}

template <typename T>
void run_upsample_grad_features(const Arguments<T>& a, const SubpixelStrides& strides,
                                const Stream& stream) {
  launch_upsample_grad_features(a, strides, Launcher(stream));
}

template <typename T>
void run_filter_norm(const FilterNormArguments<T>& a, const Stream& stream) {
  launch_filter_norm(a, Launcher(stream));
}

template <typename T>
void run_filter_norm_backward(const FilterNormArguments<T>& a, const Stream& stream) {
  launch_filter_norm_backward(a, Launcher(stream));
}

}  // namespace ddf::cuda
