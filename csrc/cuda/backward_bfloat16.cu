#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_BACKWARD(BFloat16);
}  // namespace ddf::cuda
