#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_FORWARD(double);
DDF_COMPILE_BACKWARD(double);
}  // namespace ddf::cuda
