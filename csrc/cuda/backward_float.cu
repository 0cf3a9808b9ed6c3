#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_BACKWARD(float);
}  // namespace ddf::cuda
