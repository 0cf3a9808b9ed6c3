// Takes the place of CUDA's driver for kernels that are known by name: runs them on the host, with
// the parameters that the driver would be given. DDF_HOST_KERNELS is the list of them (build.py).
#pragma once
#include <cstring>
#include <string>
#include <tuple>
#include <utility>

#include "cuda_runtime.h"
#include "kernels.cuh"

namespace ddf::host {

struct Grid {
  unsigned blocks, threads, shared_bytes;
};

template <auto Kernel>
struct Run;
template <typename... Parameters, void (*Kernel)(Parameters...)>
struct Run<Kernel> {
  static void run(const Grid& grid, void** parameters) {
    run(grid, parameters, std::index_sequence_for<Parameters...>());
  }
  static const char* sizes() {
    static const std::string text = ((std::to_string(sizeof(Parameters)) + " ") + ...);
    return text.c_str();
  }

 private:
  template <size_t... I>
  static void run(const Grid& grid, void** parameters, std::index_sequence<I...>) {
    machine().launch([&] { Kernel(*static_cast<Parameters*>(parameters[I])...); }, grid.blocks,
                     grid.threads, grid.shared_bytes, (sizeof(Parameters) + ...));
  }
};

struct NamedKernel {
  const char* name;
  void (*run)(const Grid&, void**);
  const char* (*sizes)();  // of the parameters
};
const NamedKernel named_kernels[] = {DDF_HOST_KERNELS};

}  // namespace ddf::host

extern "C" {

// Null if there is none of this name.
const void* ddf_host_kernel(const char* name) {
  for (const auto& kernel : ddf::host::named_kernels) {
    if (std::strcmp(kernel.name, name) == 0) return &kernel;
  }
  return nullptr;
}

// The sizes of the parameters of a kernel.
const char* ddf_host_parameters(const void* kernel) {
  return static_cast<const ddf::host::NamedKernel*>(kernel)->sizes();
}

// As cuLaunchKernel.
int ddf_host_launch(const void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                    unsigned threads_y, unsigned threads_z, unsigned shared_bytes,
                    CUstream_st* stream, void** parameters, void** extra) {
  if (y * z * threads_y * threads_z != 1 || extra != nullptr) ddf::host::fail("wrong dimensions");
  const cudaError_t error = ddf::host::error_of_kernels();
  // Another image than that of this kernel is missing.
  if (error != cudaSuccess && error != cudaErrorNoKernelImageForDevice) return error;
  ddf::host::note_launch(stream);
  static_cast<const ddf::host::NamedKernel*>(kernel)->run({x, threads_x, shared_bytes}, parameters);
  return 0;
}
}
