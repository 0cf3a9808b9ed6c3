// Launches kernels, and declares the functions that ops.cu calls. They are instantiated for each
// dtype in a separate file (forward_float.cu, ...), which compilers can process in parallel.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <functional>
#include <string>

#include "arguments.cuh"
#include "driver.cuh"
#include "filter_norm.cuh"
#include "upsample.cuh"
#if !defined(DDF_KERNELS_BY_NAME)
#include "runtime.cuh"
#endif

namespace ddf::cuda {

// Where the kernels of a call run.
struct Stream {
  int device;  // the current one
  cudaStream_t stream;
};

class Launcher {
 public:
  explicit Launcher(const Stream& on) : on_(on) {}

  template <typename... Parameters, typename... Given>
  void operator()(const char* name, const Handle<Parameters...>& kernel, int64_t blocks,
                  int threads, size_t shared_bytes, const Given&... given) const {
    STD_TORCH_CHECK(blocks <= kMaxBlocks, name, ": the tensors need ", blocks,
                    " blocks, CUDA allows ", kMaxBlocks);
    const std::string error = start(kernel, blocks, threads, shared_bytes, given...);
    STD_TORCH_CHECK(error.empty(), name, ": the kernel did not start: ", error);
  }

 private:
  // Returns what went wrong, or an empty string.
  template <typename... Parameters, typename... Given>
  std::string start(const Handle<Parameters...>& kernel, unsigned blocks, int threads,
                    size_t shared_bytes, const Given&... given) const {
#if !defined(DDF_KERNELS_BY_NAME)
    if (!by_name_on[on_.device]) {
      return start_compiled(kernel.compiled, on_.stream, blocks, threads, shared_bytes, given...);
    }
#endif
    return start_by_name(kernel, on_.device, on_.stream, blocks, threads, shared_bytes, given...);
  }

  Stream on_;
};

// Allocates scratch memory of so many elements, valid until the kernels are done.
template <typename T>
using Allocate = std::function<T*(int64_t)>;

template <typename T>
void run_forward(const Arguments<T>& a, const Stream& stream);

template <typename T>
void run_pack(const Arguments<T>& a, const Allocate<T>& allocate, const Stream& stream);

template <typename T>
void run_backward(const Arguments<T>& a, const Gradients<T>& to, const Allocate<float>& allocate,
                  const Stream& stream);

template <typename T>
void run_filter_norm(const FilterNormArguments<T>& a, const Stream& stream);

template <typename T>
void run_filter_norm_backward(const FilterNormArguments<T>& a, const Stream& stream);

// Instantiated in upsample.cu. Returns false if it does not support the call.
template <typename T>
bool run_upsample_3x3(const Arguments<T>& a, const SubpixelStrides& strides, const Stream& stream);

template <typename T>
void run_upsample_grad_features(const Arguments<T>& a, const SubpixelStrides& strides,
                                const Stream& stream);

}  // namespace ddf::cuda
