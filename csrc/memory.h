// Allocation for the operators of every device, and the exception of a failed allocation.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

// From Python's stable ABI. Weak, so that processes without Python can load the libraries.
extern "C" {
struct _object;
__attribute__((weak)) _object* PyImport_ImportModule(const char* name);
__attribute__((weak)) _object* PyObject_CallMethod(_object* object, const char* name,
                                                   const char* format, ...);
}

namespace pybind11 {

// pybind11's base class of exceptions that set the Python error themselves. pybind11 exports it, so
// that any module can throw one.
class __attribute__((visibility("default"))) builtin_exception : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
  virtual void set_error() const = 0;
};

}  // namespace pybind11

namespace ddf {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// LibTorch's C interface reports a failed allocation but drops its exception. Python repeats the
// allocation, which raises it again.
class FailedAllocation : public pybind11::builtin_exception {
 public:
  FailedAllocation(int64_t bytes, const torch::stable::Device& device)
      : builtin_exception((is_cuda(device) ? "CUDA out of memory. Tried to allocate "
                                           : "ddf_mm: can't allocate memory: tried to allocate ") +
                          std::to_string(bytes) + " bytes"),
        bytes_(bytes),
        device_(is_cuda(device) ? "cuda:" + std::to_string(device.index()) : "cpu") {}

  void set_error() const override {
    _object* const library = PyImport_ImportModule("ddf_mm.ops.library");
    if (library != nullptr)
      PyObject_CallMethod(library, "raise_failed_allocation", "Lss", static_cast<long long>(bytes_),
                          device_.c_str(), what());
  }

 private:
  static bool is_cuda(const torch::stable::Device& device) {
    return device.type() == torch::headeronly::DeviceType::CUDA;
  }

  int64_t bytes_;
  std::string device_;
};

inline int64_t bytes_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// Returns allocate(); throws FailedAllocation if that fails.
template <typename Allocate>
Tensor allocated(int64_t elements, torch::headeronly::ScalarType type,
                 const torch::stable::Device& device, const Allocate& allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
    throw FailedAllocation(elements * bytes_of(type), device);
  }
}

// Uninitialized, with the device of `like`.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, bool channels_last,
                    torch::headeronly::ScalarType type) {
  const int64_t dimensions = size.size();
  std::vector<int64_t> strides(dimensions);
  int64_t elements = 1, step = 1;
  for (int64_t i = dimensions - 1; i >= 0; --i) {
    const int64_t at = channels_last ? std::array{0, 2, 3, 1}[i] : i;
    strides[at] = step;
    step *= std::max<int64_t>(size[at], 1);
    elements *= size[at];
  }
  const torch::stable::Device device = like.device();
  return allocated(elements, type, device, [&] {
    using torch::stable::detail::from;
    const auto number = [](auto value) { return torch::stable::detail::to<int32_t>(value); };
    AtenTensorHandle tensor;
    // torch::stable::empty takes three times as long: it looks the op up by its name.
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, size.data(), strides.data(),
                                                    number(from(type)), number(from(device.type())),
                                                    device.index(), &tensor));
    return Tensor(tensor);
  });
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, bool channels_last) {
  return empty(like, size, channels_last, like.scalar_type());
}

// An empty tensor, returned for a gradient that is not needed.
inline Tensor no_gradient(const Tensor& like) { return empty(like, {0}, false); }

// t itself, or a copy of it in this memory format.
inline Tensor in_layout(const Tensor& t, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (!channels_last && t.is_contiguous()) return t;
  return allocated(t.numel(), t.scalar_type(), t.device(), [&] {
    return torch::stable::contiguous(
        t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  });
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(in_layout(*t, false)) : std::nullopt;
}

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace ddf
