#include "launcher.cuh"
#include "upsample.cuh"

namespace ddf::cuda {

template <typename T>
bool run_upsample_3x3(const Arguments<T>& a, const SubpixelStrides& strides, const Stream& stream) {
  return launch_upsample_3x3(a, strides, Launcher(stream));
}

#define DDF_INSTANTIATE_UPSAMPLE(type) \
  template bool run_upsample_3x3(const Arguments<type>&, const SubpixelStrides&, const Stream&)

DDF_INSTANTIATE_UPSAMPLE(float);
DDF_INSTANTIATE_UPSAMPLE(double);
DDF_INSTANTIATE_UPSAMPLE(Half);
DDF_INSTANTIATE_UPSAMPLE(BFloat16);

}  // namespace ddf::cuda
