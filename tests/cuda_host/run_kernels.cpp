// A library for ctypes that runs one pass of an operation through the CUDA kernels on the host.
#include <array>
#include <string>

#include "dispatch.cuh"
#include "filter_norm.cuh"
#include "upsample.cuh"

namespace {

using ddf::host::fail;
using ddf::host::GlobalMemory;
using ddf::host::machine;
using ddf::host::Order;
using ddf::host::Use;

struct HostTensor {
  void* data;     // null for a filter that is None and a gradient that is not needed
  int64_t bytes;  // from data to the end of the last element
  int64_t strides[4];
};

struct Call {
  HostTensor grad, features, channel_filter, spatial_filter;
  // The output, in the forward pass; grad_features, grad_channel, grad_spatial in the backward
  // pass.
  HostTensor results[3];
  ddf::Geometry geometry;
  // Strides between subpixels of the filters and of their gradients.
  ddf::cuda::SubpixelStrides filters, gradients;
  ddf::CombineMode combine;
  // For ddf_pack only; the tensors have the accumulation type.
  int32_t relu;
  double channel_scale, spatial_scale, eps;
  HostTensor channel_std, bias;
};

// A call of filter_norm. std, mean and their gradients have the accumulation type.
struct NormCall {
  HostTensor grad, x, std, mean;
  HostTensor results[3];
  int64_t batch, filters, taps, pixels;
  int32_t taps_inner;
  double scale, eps;
};

std::string message, launched;

struct Launch {
  template <typename... Parameters, typename... Given>
  void operator()(const char*, const ddf::cuda::Handle<Parameters...>& kernel, int64_t blocks,
                  int threads, size_t shared_bytes, const Given&... given) const {
    launched += *kernel.name + '\n';
    machine().launch([&] { kernel.compiled(given...); }, blocks, threads, shared_bytes,
                     (sizeof(Parameters) + ...));
  }
};

using Bytes = std::vector<unsigned char>;

template <typename T>
std::array<Bytes, 3> run_once(const std::string& pass, const Call& call, Order order) {
  machine().order = order;
  machine().tensors.clear();
  std::vector<std::unique_ptr<GlobalMemory>> memories;
  const auto place = [&](const void* like, int64_t bytes, Use use) -> void* {
    if (like == nullptr) return nullptr;
    memories.push_back(std::make_unique<GlobalMemory>(like, bytes, use));
    machine().tensors.push_back(memories.back().get());
    return memories.back()->data();
  };
  const auto view = [&](const HostTensor& t, auto* type, Use use) {
    using Element = std::remove_pointer_t<decltype(type)>;
    return ddf::cuda::View<Element>{static_cast<Element*>(place(t.data, t.bytes, use)),
                                    t.strides[0], t.strides[1], t.strides[2], t.strides[3]};
  };
  const auto input = [&](const HostTensor& t) {
    return view(t, static_cast<const T*>(nullptr), Use::input);
  };
  const auto result = [&](const HostTensor& t) {
    return view(t, static_cast<T*>(nullptr), Use::result);
  };
  const auto scratch = [&](int64_t elements, auto zero) {
    alignas(64) static const unsigned char aligned[1] = {};
    using Element = decltype(zero);
    return static_cast<Element*>(place(aligned, elements * sizeof(Element), Use::scratch));
  };
  const auto allocate = [&](int64_t floats) { return scratch(floats, 0.f); };
  ddf::cuda::Arguments<T> a{};
  a.geometry = call.geometry;
  a.combine = call.combine;
  a.grad = input(call.grad);
  a.features = input(call.features);
  a.channel_filter = input(call.channel_filter);
  a.spatial_filter = input(call.spatial_filter);
  const ddf::cuda::View<T> views[3] = {result(call.results[0]), result(call.results[1]),
                                       result(call.results[2])};
  if (pass == "forward") {
    a.result = views[0];
    launch_forward(a, Launch{});
  } else if (pass == "pack") {
    using A = ddf::cuda::Accumulate<T>;
    const auto parameter = [&](const HostTensor& t) {
      return static_cast<const A*>(place(t.data, t.bytes, Use::input));
    };
    a.pack.channel_scale = static_cast<A>(call.channel_scale);
    a.pack.spatial_scale = static_cast<A>(call.spatial_scale);
    a.pack.eps = static_cast<A>(call.eps);
    a.pack.channel_std = parameter(call.channel_std);
    a.pack.bias = parameter(call.bias);
    if (call.relu) a.pack.output_min = 0;
    a.result = views[0];
    launch_pack(a, [&](int64_t elements) { return scratch(elements, T{}); }, Launch{});
  } else if (pass == "backward") {
    launch_backward(a, ddf::cuda::Gradients<T>{views[0], views[1], views[2]}, allocate, Launch{});
  } else if (pass == "up forward") {
    a.result = views[0];
    if (!launch_upsample_3x3(a, call.filters, Launch{})) {
      for_each_subpixel(a, call.filters,
                        [](const auto& subpixel, int64_t) { launch_forward(subpixel, Launch{}); });
    }
  } else if (pass == "up backward") {
    a.result = views[0];
    if (a.result.data != nullptr) launch_upsample_grad_features(a, call.filters, Launch{});
    a.result = {};
    const ddf::cuda::Gradients<T> to{{}, views[1], views[2]};
    for_each_subpixel(a, call.filters, [&](const auto& subpixel, int64_t r) {
      launch_backward(subpixel, grad_filters_of(to, call.gradients, r), allocate, Launch{});
    });
  } else {
    fail("no pass ", pass);
  }
  for (const auto& memory : memories) {
    memory->check_red_zones();
    memory->check_complete();
  }
  std::array<Bytes, 3> bytes;
  for (int i = 0; i < 3; ++i) {
    const auto* const begin = reinterpret_cast<const unsigned char*>(views[i].data);
    if (begin != nullptr) bytes[i].assign(begin, begin + call.results[i].bytes);
  }
  return bytes;
}

template <typename T>
std::array<Bytes, 3> run_once(const std::string& pass, const NormCall& call, Order order) {
  using A = ddf::cuda::Accumulate<T>;
  machine().order = order;
  machine().tensors.clear();
  std::vector<std::unique_ptr<GlobalMemory>> memories;
  const auto place = [&](const HostTensor& t, Use use) -> void* {
    if (t.data == nullptr) return nullptr;
    memories.push_back(std::make_unique<GlobalMemory>(t.data, t.bytes, use));
    machine().tensors.push_back(memories.back().get());
    return memories.back()->data();
  };
  void* results[3];
  for (int i = 0; i < 3; ++i) results[i] = place(call.results[i], Use::result);
  ddf::cuda::FilterNormArguments<T> a{};
  a.batch = call.batch;
  a.filters = call.filters;
  a.taps = call.taps;
  a.pixels = call.pixels;
  a.taps_inner = call.taps_inner;
  a.grad = static_cast<const T*>(place(call.grad, Use::input));
  a.x = static_cast<const T*>(place(call.x, Use::input));
  a.std = static_cast<const A*>(place(call.std, Use::input));
  a.mean = static_cast<const A*>(place(call.mean, Use::input));
  a.scale = static_cast<A>(call.scale);
  a.eps = static_cast<A>(call.eps);
  a.result = static_cast<T*>(results[0]);
  a.grad_std = static_cast<A*>(results[1]);
  a.grad_mean = static_cast<A*>(results[2]);
  if (pass == "norm") {
    launch_filter_norm(a, Launch{});
  } else if (pass == "norm_backward") {
    launch_filter_norm_backward(a, Launch{});
  } else {
    fail("no pass ", pass);
  }
  for (const auto& memory : memories) {
    memory->check_red_zones();
    memory->check_complete();
  }
  std::array<Bytes, 3> bytes;
  for (int i = 0; i < 3; ++i) {
    const auto* const begin = static_cast<const unsigned char*>(results[i]);
    if (begin != nullptr) bytes[i].assign(begin, begin + call.results[i].bytes);
  }
  return bytes;
}

template <typename T, typename Call>
void run(const std::string& pass, const Call& call) {
  const auto first = run_once<T>(pass, call, Order::forward);
  for (const Order order : {Order::backward, Order::shuffled}) {
    if (run_once<T>(pass, call, order) != first) {
      fail("the result depends on the order of the threads");
    }
  }
  for (int i = 0; i < 3; ++i) {
    if (!first[i].empty()) std::memcpy(call.results[i].data, first[i].data(), first[i].size());
  }
}

template <typename Call>
const char* run_dtype(const char* pass, const char* dtype, const Call& call) {
  message.clear();
  launched.clear();
  const std::string type = dtype;
  try {
    if (type == "float32") run<float>(pass, call);
#ifndef DDF_FLOAT32_ONLY
    else if (type == "float64")
      run<double>(pass, call);
    else if (type == "float16")
      run<ddf::cuda::Half>(pass, call);
    else if (type == "bfloat16")
      run<ddf::cuda::BFloat16>(pass, call);
#endif
    else
      fail("no dtype ", type);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace

// Write call->results and return the error, or an empty string.
extern "C" const char* ddf_run_on_host(const char* pass, const char* dtype, const Call* call) {
  return run_dtype(pass, dtype, *call);
}
extern "C" const char* ddf_norm_on_host(const char* pass, const char* dtype, const NormCall* call) {
  return run_dtype(pass, dtype, *call);
}

// Names of the kernels of the last call, in each order of the threads.
extern "C" const char* ddf_last_kernels() { return launched.c_str(); }
