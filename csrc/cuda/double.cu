#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_FORWARD(double);
DDF_INSTANTIATE_BACKWARD(double);
}  // namespace ddf::cuda
