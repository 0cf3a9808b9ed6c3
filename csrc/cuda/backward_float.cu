#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_BACKWARD(float);
}  // namespace ddf::cuda
