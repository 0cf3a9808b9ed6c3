#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_BACKWARD(Half);
}  // namespace ddf::cuda
