// The CUDA implementations of the operators, whose schemas are in ../ops.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "launcher.cuh"
#include "tensors.h"

namespace ddf::cuda {
namespace {

using torch::headeronly::ScalarType;

Stream current_stream(const Tensor& tensor) {
  const int device = tensor.get_device_index();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return {device, static_cast<cudaStream_t>(stream)};
}

// Calls function(T{}) with the kernels' type for `type`.
template <typename Function>
void with_type(ScalarType type, Function&& function) {
  switch (type) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, "features must be float16, bfloat16, float32 or float64, got ",
                      torch::headeronly::toString(type));
  }
}

// Of filters [B, subpixels, ...], the view of the first subpixel.
template <typename T>
View<T> strided_view(T* data, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {data, t.stride(0), t.stride(last - 2), t.stride(last - 1), t.stride(last)};
}

template <typename T>
View<const T> view_of(const Tensor& t) {
  return strided_view(static_cast<const T*>(t.const_data_ptr()), t);
}

template <typename T>
View<const T> view_of(const OptionalTensor& t) {
  return t.has_value() ? view_of<T>(*t) : View<const T>{};
}

template <typename T>
View<T> writable_view_of(const Tensor& t) {
  return strided_view(static_cast<T*>(t.mutable_data_ptr()), t);
}

// `t` as the fast kernels need it, with contiguous rows, or with channels_last contiguous channels,
// in aligned groups of four where a copy has them: itself, or a copy, which costs less than kernels
// for any strides.
Tensor readable(const Tensor& t, bool channels_last) {
  bool fits = t.stride(channels_last ? 1 : 3) == 1;
  if (channels_last && t.size(1) % 4 == 0) {
    const auto address = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    fits = fits && address % (4 * bytes_of(t.scalar_type())) == 0;
    for (const int i : {0, 2, 3}) fits = fits && t.stride(i) % 4 == 0;
  }
  return fits ? t : in_layout(t, channels_last);
}

// The geometry, if launches of CUDA kernels support it.
Geometry check_launchable(const Geometry& g) {
  STD_TORCH_CHECK(is_within_launches(g), "ddf_mm: CUDA kernels support images of at most ",
                  kMaxPixels, " pixels, and as many channels, kernel_size * dilation and stride, ",
                  "with at most ", kMaxElements32, " values in one row of all channels");
  return g;
}

// Scratch memory, valid until the kernels are done: the caching allocator reuses a freed block only
// for later work of the same stream, so it may be freed before.
template <typename T>
class Scratch {
 public:
  Scratch(const Tensor& like, ScalarType type) : like_(like), type_(type) {}
  T* operator()(int64_t elements) {
    tensors_.push_back(empty(like_, {elements}, false, type_));
    return static_cast<T*>(tensors_.back().mutable_data_ptr());
  }

 private:
  const Tensor& like_;
  ScalarType type_;
  std::vector<Tensor> tensors_;
};

template <typename T>
Arguments<T> arguments_of(const Geometry& geometry, CombineMode combine, const Tensor& features,
                          const OptionalTensor& channel_filter,
                          const OptionalTensor& spatial_filter) {
  Arguments<T> a{};
  a.geometry = geometry;
  a.combine = combine;
  a.features = view_of<T>(features);
  a.channel_filter = view_of<T>(channel_filter);
  a.spatial_filter = view_of<T>(spatial_filter);
  return a;
}

Tensor ddf(const Tensor& features, const OptionalTensor& channel_filter,
           const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation,
           int64_t stride, const std::string& kernel_combine) {
  const CombineMode combine = combine_of(kernel_combine);
  const Geometry g = check_launchable(
      geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride));
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const bool channels_last = ddf::is_channels_last(features);
  const Tensor out = empty(features, output_size(g), channels_last);
  if (out.numel() == 0) return out;
  const Tensor x = readable(features, channels_last);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, combine, x, channel_filter, spatial_filter);
    a.result = writable_view_of<T>(out);
    run_forward(a, current_stream(features));
  });
  return out;
}

template <typename T>
View<T> view_if(bool is_needed, const Tensor& t) {
  return is_needed ? writable_view_of<T>(t) : View<T>{};
}

std::tuple<Tensor, Tensor, Tensor> ddf_backward(
    const Tensor& grad, const Tensor& features, const OptionalTensor& channel_filter,
    const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation, int64_t stride,
    const std::string& kernel_combine, bool need_features, bool need_channel, bool need_spatial) {
  const CombineMode combine = combine_of(kernel_combine);
  const Geometry g = check_launchable(
      geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride));
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const DDFGradients grads(g, grad, features, channel_filter, spatial_filter, need_features,
                           need_channel, need_spatial);
  if (grads.is_empty()) return {grads.features, grads.channel_filter, grads.spatial_filter};
  const bool channels_last = ddf::is_channels_last(features);
  const Tensor x = readable(features, channels_last), dy = readable(grad, channels_last);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, combine, x, channel_filter, spatial_filter);
    a.grad = view_of<T>(dy);
    Scratch<float> scratch(features, ScalarType::Float);
    const Gradients<T> views{view_if<T>(grads.need_features, grads.features),
                             view_if<T>(grads.need_channel, grads.channel_filter),
                             view_if<T>(grads.need_spatial, grads.spatial_filter)};
    run_backward(a, views, Allocate<float>(std::ref(scratch)), current_stream(features));
  });
  return {grads.features, grads.channel_filter, grads.spatial_filter};
}

FilterNormGeometry check_launchable(const FilterNormGeometry& g) {
  STD_TORCH_CHECK(g.taps <= kMaxElements32, "ddf_mm: CUDA kernels support filters of at most ",
                  kMaxElements32, " taps");
  return g;
}

template <typename T>
FilterNormArguments<T> arguments_of(const FilterNormGeometry& g, const Tensor& x,
                                    const OptionalTensor& std, double scale, double eps) {
  using A = Accumulate<T>;
  FilterNormArguments<T> a{};
  a.batch = g.batch;
  a.filters = g.filters;
  a.taps = g.taps;
  a.pixels = g.pixels;
  a.taps_inner = g.has_taps_inner();
  a.x = static_cast<const T*>(x.const_data_ptr());
  a.std = static_cast<const A*>(data_of(std));
  a.scale = static_cast<A>(scale);
  a.eps = static_cast<A>(eps);
  return a;
}

Tensor filter_norm(const Tensor& x, int64_t filters, const OptionalTensor& std,
                   const OptionalTensor& mean, double scale, double eps) {
  const FilterNormGeometry g = check_launchable(FilterNormGeometry(x, filters, std));
  check_parameter(mean, x, x.size(1), "mean", "x");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor result = empty(x, size_of(x), g.channels_last);
  if (g.is_empty()) return result;
  const Tensor ordered = g.ordered(x);
  const OptionalTensor factors = contiguous(std), shifts = contiguous(mean);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    FilterNormArguments<T> a = arguments_of<T>(g, ordered, factors, scale, eps);
    a.mean = static_cast<const Accumulate<T>*>(data_of(shifts));
    a.result = static_cast<T*>(result.mutable_data_ptr());
    run_filter_norm(a, current_stream(x));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> filter_norm_backward(const Tensor& grad, const Tensor& x,
                                                        int64_t filters, const OptionalTensor& std,
                                                        double scale, double eps, bool need_x,
                                                        bool need_std, bool need_mean) {
  const FilterNormGeometry g = check_launchable(FilterNormGeometry(x, filters, std));
  check_like(grad, x, "grad", size_of(x), "x");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const FilterNormGradients grads(g, x, need_x, need_std, need_mean);
  if (g.is_empty()) return {grads.x, grads.std, grads.mean};
  const Tensor ordered = g.ordered(x), ordered_grad = g.ordered(grad);
  const OptionalTensor factors = contiguous(std);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    FilterNormArguments<T> a = arguments_of<T>(g, ordered, factors, scale, eps);
    a.grad = static_cast<const T*>(ordered_grad.const_data_ptr());
    if (need_x) a.result = static_cast<T*>(grads.x.mutable_data_ptr());
    if (need_std) a.grad_std = static_cast<A*>(grads.std.mutable_data_ptr());
    if (need_mean) a.grad_mean = static_cast<A*>(grads.mean.mutable_data_ptr());
    run_filter_norm_backward(a, current_stream(x));
  });
  return {grads.x, grads.std, grads.mean};
}

Tensor ddf_pack(const Tensor& features, const Tensor& raw_channel, const Tensor& raw_spatial,
                const OptionalTensor& channel_std, double channel_scale, double spatial_scale,
                double eps, const OptionalTensor& bias, bool relu, int64_t kernel_size,
                int64_t dilation, int64_t stride, const std::string& kernel_combine) {
  const CombineMode combine = combine_of(kernel_combine);
  const Geometry g = check_launchable(pack_geometry_of(
      features, raw_channel, raw_spatial, channel_std, bias, kernel_size, dilation, stride));
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const bool channels_last = ddf::is_channels_last(features);
  const Tensor out = empty(features, output_size(g), channels_last);
  if (out.numel() == 0) return out;
  const Tensor x = readable(features, channels_last);
  const Tensor channel = in_layout(raw_channel, false);
  const Tensor spatial = in_layout(raw_spatial, ddf::is_channels_last(raw_spatial));
  const OptionalTensor std = contiguous(channel_std), offsets = contiguous(bias);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    Arguments<T> a = arguments_of<T>(g, combine, x, channel, spatial);
    a.result = writable_view_of<T>(out);
    a.pack.channel_scale = static_cast<A>(channel_scale);
    a.pack.spatial_scale = static_cast<A>(spatial_scale);
    a.pack.eps = static_cast<A>(eps);
    a.pack.channel_std = static_cast<const A*>(data_of(std));
    a.pack.bias = static_cast<const A*>(data_of(offsets));
    if (relu) a.pack.output_min = 0;
    Scratch<T> scratch(features, features.scalar_type());
    run_pack(a, Allocate<T>(std::ref(scratch)), current_stream(features));
  });
  return out;
}

int64_t subpixel_stride(const OptionalTensor& filter) { return filter ? filter->stride(1) : 0; }

Tensor ddf_up(const Tensor& features, const OptionalTensor& channel_filter,
              const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t scale_factor,
              int64_t dilation, const std::string& kernel_combine) {
  const CombineMode combine = combine_of(kernel_combine);
  const Geometry g = check_launchable(geometry_of(features, channel_filter, spatial_filter,
                                                  kernel_size, dilation, 1, scale_factor));
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const bool channels_last = ddf::is_channels_last(features);
  const Tensor out = empty(features, output_size(g), channels_last);
  if (out.numel() == 0) return out;
  const Tensor x = readable(features, channels_last);
  const SubpixelStrides strides{subpixel_stride(channel_filter), subpixel_stride(spatial_filter)};
  const Stream stream = current_stream(features);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, combine, x, channel_filter, spatial_filter);
    a.result = writable_view_of<T>(out);
    if (run_upsample_3x3(a, strides, stream)) return;
    for_each_subpixel(a, strides,
                      [&](const Arguments<T>& call, int64_t) { run_forward(call, stream); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> ddf_up_backward(
    const Tensor& grad, const Tensor& features, const OptionalTensor& channel_filter,
    const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t scale_factor,
    int64_t dilation, const std::string& kernel_combine, bool need_features, bool need_channel,
    bool need_spatial) {
  const CombineMode combine = combine_of(kernel_combine);
  const Geometry g = check_launchable(geometry_of(features, channel_filter, spatial_filter,
                                                  kernel_size, dilation, 1, scale_factor));
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const DDFGradients grads(g, grad, features, channel_filter, spatial_filter, need_features,
                           need_channel, need_spatial);
  if (grads.is_empty()) return {grads.features, grads.channel_filter, grads.spatial_filter};
  const bool channels_last = ddf::is_channels_last(features);
  const Tensor x = readable(features, channels_last), dy = readable(grad, channels_last);
  const SubpixelStrides strides{subpixel_stride(channel_filter), subpixel_stride(spatial_filter)};
  const Stream stream = current_stream(features);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, combine, x, channel_filter, spatial_filter);
    a.grad = view_of<T>(dy);
    if (grads.need_features) {
      a.result = writable_view_of<T>(grads.features);
      run_upsample_grad_features(a, strides, stream);
    }
    if (!grads.need_channel && !grads.need_spatial) return;
    const Gradients<T> views{{},
                             view_if<T>(grads.need_channel, grads.channel_filter),
                             view_if<T>(grads.need_spatial, grads.spatial_filter)};
    const SubpixelStrides grad_strides{grads.need_channel ? grads.channel_filter.stride(1) : 0,
                                       grads.need_spatial ? grads.spatial_filter.stride(1) : 0};
    a.result = View<T>{};
    for_each_subpixel(a, strides, [&](const Arguments<T>& call, int64_t r) {
      Scratch<float> scratch(features, ScalarType::Float);
      run_backward(call, grad_filters_of(views, grad_strides, r),
                   Allocate<float>(std::ref(scratch)), stream);
    });
  });
  return {grads.features, grads.channel_filter, grads.spatial_filter};
}

}  // namespace

}  // namespace ddf::cuda

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CUDA, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cuda::ddf));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cuda::ddf_backward));
  m.impl("filter_norm", TORCH_BOX(&ddf::cuda::filter_norm));
  m.impl("filter_norm_backward", TORCH_BOX(&ddf::cuda::filter_norm_backward));
  m.impl("ddf_pack", TORCH_BOX(&ddf::cuda::ddf_pack));
  m.impl("ddf_up", TORCH_BOX(&ddf::cuda::ddf_up));
  m.impl("ddf_up_backward", TORCH_BOX(&ddf::cuda::ddf_up_backward));
}

#define DDF_EXPORT extern "C" __attribute__((visibility("default")))

// What compiles kernels when they are needed (ddf_mm/ops/nvrtc.py).
DDF_EXPORT void ddf_mm_set_driver(const ddf::cuda::Driver* driver) {
  const std::lock_guard<std::mutex> lock(ddf::cuda::found_kernels_mutex);
  ddf::cuda::driver = *driver;
  ddf::cuda::found_kernels.clear();
}

// Whether a device runs such kernels, in a library that also has kernels compiled ahead of time.
DDF_EXPORT void ddf_mm_set_by_name(int device, bool by_name) {
  ddf::cuda::by_name_on.at(device) = by_name;
}

// The names of all kernels, one a line.
DDF_EXPORT const char* ddf_mm_kernels() { return ddf::cuda::kernel_names().c_str(); }
