// Which devices the kernels of this library were compiled for.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <exception>

#include "platform.cuh"

namespace ddf::cuda {

// Compiled for the same devices as the other kernels.
DDF_KERNEL(1) any_kernel() {}

}  // namespace ddf::cuda

// Why a device cannot run the compiled kernels, or null if it can. Other errors are reported by the
// calls that cause them.
extern "C" __attribute__((visibility("default"))) const char* ddf_mm_why_not_on(int device) {
  try {
    const torch::stable::accelerator::DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, ddf::cuda::any_kernel);
    if (error != cudaSuccess) cudaGetLastError();
    switch (error) {
      case cudaErrorInvalidDeviceFunction:
      case cudaErrorInvalidPtx:
      case cudaErrorJitCompilerNotFound:
      case cudaErrorNoKernelImageForDevice:
      case cudaErrorUnsupportedPtxVersion:
        return cudaGetErrorString(error);
      default:
        return nullptr;
    }
  } catch (const std::exception&) {
    return nullptr;
  }
}
