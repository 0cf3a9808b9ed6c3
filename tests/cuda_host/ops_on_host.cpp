// Emulates CUDA devices for csrc/cuda/ops.cu: together they are a library of the CUDA ops for
// tensors in host memory, which ops.cu treats as device tensors.
//
// These functions replace those of LibTorch's C interface that return devices and data pointers:
// the linker binds the calls in this library to them (-Bsymbolic) instead of LibTorch's functions
// of the same name.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <map>

#include "cuda_runtime.h"

namespace ddf::host {
namespace {

constexpr int kDevices = 2;

struct Call {
  // Devices of the call's tensors, by data pointer; -1 is the host.
  std::map<const void*, int> devices;
  std::vector<std::unique_ptr<Memory>> memories;
  std::string fault;
  std::string launches;
};

Call call;
int current_device = 0;
CUstream_st streams[kDevices][2] = {{{0}, {0}}, {{1}, {1}}};
int current_streams[kDevices] = {};
cudaError_t kernel_errors[kDevices] = {};

// LibTorch's own function of this name.
template <typename Function>
Function* of_torch(Function*, const char* name) {
  static void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const found = torch == nullptr ? nullptr : dlsym(torch, name);
  if (found == nullptr) fail("LibTorch has no ", name);
  return reinterpret_cast<Function*>(found);
}
#define OF_TORCH(function, ...) of_torch(&function, #function)(__VA_ARGS__)

// Converts an exception to an error code, for which LibTorch's macros throw.
template <typename Function>
AOTITorchError guarded(Function&& function) {
  try {
    function();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    if (call.fault.empty()) call.fault = error.what();
    return AOTI_TORCH_FAILURE;
  }
}

void check(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) fail("LibTorch failed");
}

int device_of(AtenTensorHandle tensor) {
  void* data;
  check(aoti_torch_get_data_ptr(tensor, &data));
  const auto found = call.devices.find(data);
  return found == call.devices.end() ? current_device : found->second;
}

// Allows the kernels to read or write the memory of a tensor.
void allow(AtenTensorHandle tensor, void* data, Use use) {
  if (device_of(tensor) != current_device) {
    fail("memory of device ", device_of(tensor), " in a call on device ", current_device);
  }
  int64_t dimensions, *sizes, *strides;
  int32_t dtype;
  check(aoti_torch_get_dim(tensor, &dimensions));
  check(aoti_torch_get_sizes(tensor, &sizes));
  check(aoti_torch_get_strides(tensor, &strides));
  check(aoti_torch_get_dtype(tensor, &dtype));
  int64_t elements = 1, last = 0;
  for (int64_t i = 0; i < dimensions; ++i) {
    elements *= sizes[i];
    last += (sizes[i] - 1) * strides[i];
  }
  if (elements == 0) return;
  const size_t bytes = (last + 1) * aoti_torch_dtype_element_size(dtype);
  auto* const begin = static_cast<unsigned char*>(data);
  if (use != Use::input) {
    if (elements != last + 1) fail("a result has gaps");
    // The allocator may reuse the memory of a scratch tensor that was freed.
    for (auto memory = call.memories.begin(); memory != call.memories.end();) {
      if (!(*memory)->overlaps(begin, bytes)) {
        ++memory;
        continue;
      }
      (*memory)->check_complete();
      memory = call.memories.erase(memory);
    }
    std::memset(begin, kPoison, bytes);
  }
  call.memories.push_back(std::make_unique<Memory>(begin, bytes, use));
  machine().tensors.clear();
  for (const auto& memory : call.memories) machine().tensors.push_back(memory.get());
}

}  // namespace

cudaError_t last_error() { return cudaSuccess; }

cudaError_t error_of_kernels() { return kernel_errors[current_device]; }

void note_launch(cudaStream_t stream) {
  if (stream == nullptr || stream->device != current_device) {
    fail("launch on a stream of another device than ", current_device);
  }
  const int number = stream - streams[current_device];
  call.launches += std::to_string(current_device) + ":" + std::to_string(number) + " ";
}

}  // namespace ddf::host

using namespace ddf::host;

AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  return guarded([&] {
    check(OF_TORCH(aoti_torch_get_device_type, tensor, type));
    if (*type == aoti_torch_device_type_cpu() && device_of(tensor) >= 0) {
      *type = aoti_torch_device_type_cuda();
    }
  });
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  return guarded([&] { *index = device_of(tensor); });
}

AOTITorchError torch_get_const_data_ptr(AtenTensorHandle tensor, const void** data) {
  return guarded([&] {
    void* found;
    check(aoti_torch_get_data_ptr(tensor, &found));
    allow(tensor, found, Use::input);
    *data = found;
  });
}

AOTITorchError torch_get_mutable_data_ptr(AtenTensorHandle tensor, void** data) {
  return guarded([&] {
    check(aoti_torch_get_data_ptr(tensor, data));
    allow(tensor, *data, Use::scratch);
  });
}

// The guard stores the previous current device.
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  return guarded([&] {
    if (index < 0 || index >= kDevices) fail("no device ", index);
    *guard = reinterpret_cast<DeviceGuardHandle>(new int(current_device));
    current_device = index;
  });
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  const std::unique_ptr<int> before(reinterpret_cast<int*>(guard));
  current_device = *before;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  return guarded([&] {
    if (index < 0 || index >= kDevices) fail("no device ", index);
    *stream = &streams[index][current_streams[index]];
  });
}

extern "C" {

// Begins a call of an op; to be followed by ddf_host_place for each of its tensors.
void ddf_host_begin() { call = Call{}; }
void ddf_host_place(const void* data, int device) { call.devices[data] = device; }

// Ends the call; returns the error, or an empty string.
const char* ddf_host_end(bool completed) {
  if (completed) {
    guarded([] {
      for (const auto& memory : call.memories) memory->check_complete();
      if (current_device != 0) fail("device ", current_device, " is left the current one");
    });
  }
  machine().tensors.clear();
  return call.fault.c_str();
}

// The device and the stream of each launch of the last call.
const char* ddf_host_launches() { return call.launches.c_str(); }

void ddf_host_set_stream(int device, int number) { current_streams[device] = number; }
void ddf_host_set_kernel_error(int device, int error) {
  kernel_errors[device] = static_cast<cudaError_t>(error);
}
}
