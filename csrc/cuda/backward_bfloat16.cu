#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_BACKWARD(BFloat16);
}  // namespace ddf::cuda
