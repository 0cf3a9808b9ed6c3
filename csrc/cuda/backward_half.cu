#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_BACKWARD(Half);
}  // namespace ddf::cuda
