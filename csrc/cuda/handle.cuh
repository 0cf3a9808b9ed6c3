// Kernels as they are given to a launcher: by name and, if they were compiled ahead of time,
// address.
#pragma once
#include <cxxabi.h>

#include <cstdlib>
#include <string>
#include <typeinfo>

#define DDF_HANDLE(...) (::ddf::cuda::Named<&__VA_ARGS__>::handle())

namespace ddf::cuda {

// A kernel and the types of its parameters.
template <typename... Parameters>
struct Handle {
  // As C++ writes it.
  const std::string* name;
  // Null in a library that was built without kernels.
  void (*compiled)(Parameters...);
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
  static Handle<Parameters...> handle() {
#if defined(DDF_KERNELS_BY_NAME)
    return {&name, nullptr};
#else
    return {&name, Kernel};
#endif
  }

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

}  // namespace ddf::cuda
