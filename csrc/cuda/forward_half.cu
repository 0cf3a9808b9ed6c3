#include "instantiate.cuh"

namespace ddf::cuda {
DDF_COMPILE_FORWARD(Half);
}  // namespace ddf::cuda
