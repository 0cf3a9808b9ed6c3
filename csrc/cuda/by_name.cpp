// The CUDA ops, compiled by a C++ compiler alone; NVRTC compiles the kernels when they are needed.
#define DDF_KERNELS_BY_NAME
#include "instantiate.cuh"
#include "ops.cu"
#include "upsample.cu"

namespace ddf::cuda {

DDF_INSTANTIATE_FORWARD(float);
DDF_INSTANTIATE_BACKWARD(float);
DDF_INSTANTIATE_FORWARD(double);
DDF_INSTANTIATE_BACKWARD(double);
DDF_INSTANTIATE_FORWARD(Half);
DDF_INSTANTIATE_BACKWARD(Half);
DDF_INSTANTIATE_FORWARD(BFloat16);
DDF_INSTANTIATE_BACKWARD(BFloat16);

}  // namespace ddf::cuda
