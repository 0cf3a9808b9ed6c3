#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_FORWARD(BFloat16);
}  // namespace ddf::cuda
