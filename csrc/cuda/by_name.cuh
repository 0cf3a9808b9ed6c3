// In place of the device half of platform.cuh where the host's part is compiled by a C++ compiler
// alone: kernels are known by name and parameters, and NVRTC compiles them when they are needed
// (README.md).
#pragma once
#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <typeinfo>

#define DDF_DEVICE inline
// Their bodies are instantiated, since there are pointers to the kernels, but not compiled.
#define DDF_KERNEL(...) extern inline __attribute__((gnu_inline)) void
#define DDF_UNROLL
#define DDF_UNROLL_BY(count)
#define DDF_UNROLL_NOT
#define DDF_SHARED(type, name) type* const name = nullptr
#define DDF_HANDLE(...) (::ddf::cuda::Named<&__VA_ARGS__>::handle())

namespace ddf::cuda {

// A kernel, as C++ writes it, and the types of its parameters.
template <typename... Parameters>
struct Handle {
  const std::string* name;
};

// The names of all kernels that this library can launch, one a line.
inline std::string& kernel_names() {
  static std::string names;
  return names;
}

template <auto Kernel>
struct Named;
template <typename... Parameters, void (*Kernel)(Parameters...)>
struct Named<Kernel> {
  static Handle<Parameters...> handle() { return {&name}; }

 private:
  // Demangled, the type's name is Named<&(void NAME(PARAMETERS))>.
  static std::string find_name() {
    char* const demangled = abi::__cxa_demangle(typeid(Named).name(), nullptr, nullptr, nullptr);
    const std::string text = demangled;
    std::free(demangled);
    const size_t begin = text.find("&(void ") + 7;
    const std::string found = text.substr(begin, text.find('(', begin) - begin);
    kernel_names() += found + '\n';
    return found;
  }
  static inline const std::string name = find_name();
};

// Types by which kernels are named; they have the size and alignment of those of the device.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Only declared: bodies of kernels call them.
template <typename T>
using Loaded = std::conditional_t<std::is_same_v<T, double>, double, float>;

int thread_index();
int64_t block_index();
void sync_threads();
void sync_warp();
float shuffle_xor(float value, int mask);
template <typename T>
Loaded<T> load(const T* p);
template <typename T>
void store(T* p, Loaded<T> value);
template <typename T>
void load4(float* to, const T* p);
template <typename T>
void store4(T* p, const float* from);
template <typename T>
void store2(T* p, const float* from);
void load_shared4(float* to, const float* p);
void store_shared4(float* p, const float* from);

}  // namespace ddf::cuda
