#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_FORWARD(BFloat16);
}  // namespace ddf::cuda
