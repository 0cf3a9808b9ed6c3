#include "launcher.cuh"
#include "upsample.cuh"

namespace ddf::cuda {

template <typename T>
bool run_up_window3(const Arguments<T>& a, const SubpixelStrides& strides, cudaStream_t stream) {
  return launch_up_window3(a, strides, Launcher(stream));
}

template <typename T>
void run_up_grad_features(const Arguments<T>& a, const SubpixelStrides& strides,
                          cudaStream_t stream) {
  launch_up_grad_features(a, strides, Launcher(stream));
}

#define DDF_COMPILE_UP(type)                                                                  \
  template bool run_up_window3(const Arguments<type>&, const SubpixelStrides&, cudaStream_t); \
  template void run_up_grad_features(const Arguments<type>&, const SubpixelStrides&, cudaStream_t)

DDF_COMPILE_UP(float);
DDF_COMPILE_UP(double);
DDF_COMPILE_UP(Half);
DDF_COMPILE_UP(BFloat16);

}  // namespace ddf::cuda
