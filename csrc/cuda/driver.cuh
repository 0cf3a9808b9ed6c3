// Starts kernels that are compiled when they are needed, by CUDA's driver. Python compiles and
// loads them (ddf_mm/ops/nvrtc.py), and gives the driver's functions, so that this library needs no
// part of CUDA to be built or loaded.
#pragma once
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "handle.cuh"

using cudaStream_t = struct CUstream_st*;

namespace ddf::cuda {

struct Driver {
  // Writes the kernel of this name, compiled and loaded for a device; returns whether there is one.
  bool (*find)(const char* name, int device, void** kernel);
  // Makes the context of a device the current one of this thread; returns whether it did.
  bool (*use)(int device);
  // cuLaunchKernel, known once a kernel is: kernel, grid, block, shared bytes, stream, parameters,
  // nullptr; returns an error.
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                cudaStream_t, void**, void**);
};

// Set by Python.
inline Driver driver{};

// Devices for which the kernels of this library were not compiled, if it has some. Torch counts
// devices in 8 bits. Set by Python.
inline std::array<std::atomic<bool>, 128> by_name_on{};

// Kernels that were found, by name and device, and what protects them.
inline std::map<std::pair<const std::string*, int>, void*> found_kernels;
inline std::mutex found_kernels_mutex;

// The kernel for a device, or null if there is none.
inline void* find_kernel(const std::string& name, int device) {
  auto& mutex = found_kernels_mutex;
  auto& found = found_kernels;
  const std::pair key{&name, device};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = found.find(key);
    if (known != found.end()) return known->second;
  }
  // Unlocked, since it takes Python's lock, whose owner may wait for this one.
  void* kernel = nullptr;
  if (driver.find == nullptr || !driver.find(name.c_str(), device, &kernel)) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  return found.emplace(key, kernel).first->second;
}

// Returns what went wrong, or an empty string.
template <typename... Parameters, typename... Given>
std::string start_by_name(const Handle<Parameters...>& kernel, int device, cudaStream_t stream,
                          unsigned blocks, unsigned threads, size_t shared_bytes,
                          const Given&... given) {
  constexpr int kInvalidContext = 201;
  void* const function = find_kernel(*kernel.name, device);
  if (function == nullptr) return "it was not compiled; ddf_mm.ops.backend_info() says why";
  // Converted as by a call of the kernel.
  std::tuple<Parameters...> values(given...);
  std::array<void*, sizeof...(Parameters)> parameters = std::apply(
      [](auto&... value) { return std::array<void*, sizeof...(Parameters)>{&value...}; }, values);
  const auto launch = [&] {
    return driver.launch(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream,
                         parameters.data(), nullptr);
  };
  int error = launch();
  // A thread that has called nothing of CUDA's runtime yet, such as autograd's.
  if (error == kInvalidContext && driver.use(device)) error = launch();
  return error == 0 ? "" : "error " + std::to_string(error) + " of CUDA's driver";
}

}  // namespace ddf::cuda
