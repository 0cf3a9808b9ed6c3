// Definitions of the functions declared in launcher.cuh, and macros that instantiate them for a
// dtype.
#pragma once
#include "dispatch.cuh"
#include "launcher.cuh"

#define DDF_INSTANTIATE_FORWARD(type)                                                  \
  template void run_forward(const Arguments<type>&, cudaStream_t);                     \
  template void run_pack(const Arguments<type>&, const Allocate<type>&, cudaStream_t); \
  template void run_filter_norm(const FilterNormArguments<type>&, cudaStream_t)
#define DDF_INSTANTIATE_BACKWARD(type)                                       \
  template void run_backward(const Arguments<type>&, const Gradients<type>&, \
                             const Allocate<float>&, cudaStream_t);          \
  template void run_filter_norm_backward(const FilterNormArguments<type>&, cudaStream_t)

namespace ddf::cuda {

template <typename T>
void run_forward(const Arguments<T>& a, cudaStream_t stream) {
  launch_forward(a, Launcher(stream));
}

template <typename T>
void run_pack(const Arguments<T>& a, const Allocate<T>& allocate, cudaStream_t stream) {
  launch_pack(a, allocate, Launcher(stream));
}

template <typename T>
void run_backward(const Arguments<T>& a, const Gradients<T>& to, const Allocate<float>& allocate,
                  cudaStream_t stream) {
  launch_backward(a, to, allocate, Launcher(stream));
}

template <typename T>
void run_filter_norm(const FilterNormArguments<T>& a, cudaStream_t stream) {
  launch_filter_norm(a, Launcher(stream));
}

template <typename T>
void run_filter_norm_backward(const FilterNormArguments<T>& a, cudaStream_t stream) {
  launch_filter_norm_backward(a, Launcher(stream));
}

}  // namespace ddf::cuda
