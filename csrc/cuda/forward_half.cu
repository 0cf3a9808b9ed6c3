#include "instantiate.cuh"

namespace ddf::cuda {
DDF_INSTANTIATE_FORWARD(Half);
}  // namespace ddf::cuda
