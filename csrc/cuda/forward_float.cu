#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_FORWARD(float);
}  // namespace ddf::cuda
