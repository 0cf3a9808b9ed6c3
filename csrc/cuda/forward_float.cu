#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_FORWARD(float);
}  // namespace ddf::cuda
