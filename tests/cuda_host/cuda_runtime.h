// The part of the CUDA runtime that csrc/cuda uses, on the host. The devices are in
// ops_on_host.cpp.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda_on_host.h"

struct CUstream_st {
  int device;
};
using cudaStream_t = CUstream_st*;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidPtx = 218,
  cudaErrorJitCompilerNotFound = 221,
  cudaErrorUnsupportedPtxVersion = 222,
};
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice
             ? "no kernel image is available for execution on the device"
             : "an error of CUDA";
}

struct dim3 {
  unsigned x = 1;
  dim3() = default;
  dim3(unsigned x) : x(x) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

struct cudaFuncAttributes {};

namespace ddf::host {

// Errors of the current device.
cudaError_t last_error();
cudaError_t error_of_kernels();
// Records a launch on `stream`.
void note_launch(cudaStream_t stream);

}  // namespace ddf::host

inline cudaError_t cudaGetLastError() { return ddf::host::last_error(); }

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return ddf::host::error_of_kernels();
}

template <typename... Parameters, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Given&... given) {
  const cudaError_t error = ddf::host::error_of_kernels();
  if (error != cudaSuccess) return error;
  ddf::host::note_launch(config->stream);
  ddf::host::machine().launch([&] { kernel(given...); }, config->gridDim.x, config->blockDim.x,
                              config->dynamicSmemBytes, (sizeof(Parameters) + ...));
  return cudaSuccess;
}
