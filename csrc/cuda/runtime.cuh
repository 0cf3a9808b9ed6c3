// Starts kernels that were compiled ahead of time, by CUDA's runtime.
#pragma once
#include <cuda_runtime.h>

#include <string>

namespace ddf::cuda {

// Returns what went wrong, or an empty string.
template <typename... Parameters, typename... Given>
std::string start_compiled(void (*kernel)(Parameters...), cudaStream_t stream, unsigned blocks,
                           int threads, size_t shared_bytes, const Given&... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, given...);
  if (error == cudaSuccess) return {};
  // Clears the error, so that later calls do not report it.
  cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace ddf::cuda
