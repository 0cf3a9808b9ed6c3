// Launches kernels, and declares the functions that ops.cu calls. They are instantiated for each
// dtype in a separate file (forward_float.cu, ...), which compilers can process in parallel.
#pragma once
#include <cuda_runtime.h>
#include <torch/headeronly/util/Exception.h>

#include <functional>

#include "arguments.cuh"
#include "filter_norm.cuh"
#include "upsample.cuh"

namespace ddf::cuda {

class Launcher {
 public:
  explicit Launcher(cudaStream_t stream) : stream_(stream) {}

  template <typename... Parameters, typename... Given>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                  size_t shared_bytes, const Given&... given) const {
    STD_TORCH_CHECK(blocks <= kMaxBlocks, name, ": the tensors need ", blocks,
                    " blocks, CUDA allows ", kMaxBlocks);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, given...);
    // Clears the error, so that later calls do not report it.
    if (error != cudaSuccess) cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, name,
                    ": the kernel did not start: ", cudaGetErrorString(error));
  }

 private:
  cudaStream_t stream_;
};

// Allocates scratch memory of so many elements, valid until the kernels are done.
template <typename T>
using Allocate = std::function<T*(int64_t)>;

template <typename T>
void run_forward(const Arguments<T>& a, cudaStream_t stream);

template <typename T>
void run_pack(const Arguments<T>& a, const Allocate<T>& allocate, cudaStream_t stream);

template <typename T>
void run_backward(const Arguments<T>& a, const Gradients<T>& to, const Allocate<float>& allocate,
                  cudaStream_t stream);

template <typename T>
void run_filter_norm(const FilterNormArguments<T>& a, cudaStream_t stream);

template <typename T>
void run_filter_norm_backward(const FilterNormArguments<T>& a, cudaStream_t stream);

// Kernels of ddf_up, instantiated in upsample.cu. The first returns false if it does not support
// the call.
template <typename T>
bool run_upsample_3x3(const Arguments<T>& a, const SubpixelStrides& strides, cudaStream_t stream);

template <typename T>
void run_upsample_grad_features(const Arguments<T>& a, const SubpixelStrides& strides,
                                cudaStream_t stream);

}  // namespace ddf::cuda
