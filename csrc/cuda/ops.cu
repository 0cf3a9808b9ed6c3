// The CUDA kernels of the operators whose schemas are in ../ops.cpp.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "launcher.cuh"
#include "tensors.h"

namespace ddf::cuda {
namespace {

using torch::headeronly::ScalarType;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
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

// Uninitialised, of `like`'s dtype, device and layout, channels_last or else contiguous.
Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty(like, sizes, ddf::is_channels_last(like));
}

// Of filters of several subpixels, [B, subpixels, ...], those of the first.
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

// Rows, columns and the pixels of one channel are counted in 32 bits; elements are not.
void check_limits(const Geometry& g) {
  constexpr int64_t limit = INT32_MAX / 4;
  STD_TORCH_CHECK(g.height <= limit && g.width <= limit && g.height * g.width <= limit &&
                      g.channels <= limit && g.kernel <= limit && g.dilation <= limit &&
                      g.kernel * g.dilation <= limit && g.stride <= limit && g.scale <= INT16_MAX &&
                      g.scale * std::max(g.height, g.width) <= limit,
                  "CUDA kernels serve images of at most ", limit,
                  " pixels, and as many channels, kernel_size * dilation and stride; of rows and "
                  "columns of the output of ddf_up, too");
}

template <typename T>
Arguments<T> arguments_of(const Geometry& geometry, bool mul, const Tensor& features,
                          const OptionalTensor& channel_filter,
                          const OptionalTensor& spatial_filter) {
  Arguments<T> a{};
  a.geometry = geometry;
  a.mul = mul;
  a.features = view_of<T>(features);
  a.channel_filter = view_of<T>(channel_filter);
  a.spatial_filter = view_of<T>(spatial_filter);
  return a;
}

Tensor forward(const Tensor& features, const OptionalTensor& channel_filter,
               const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation,
               int64_t stride, bool mul) {
  const Geometry g =
      geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride);
  check_limits(g);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor out = empty_as(features, {g.batch, g.channels, g.out_height, g.out_width});
  if (out.numel() == 0) return out;
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, mul, features, channel_filter, spatial_filter);
    a.result = writable_view_of<T>(out);
    run_forward(a, current_stream(features));
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& features,
                                            const OptionalTensor& channel_filter,
                                            const OptionalTensor& spatial_filter,
                                            int64_t kernel_size, int64_t dilation, int64_t stride,
                                            bool mul, bool need_features, bool need_channel,
                                            bool need_spatial) {
  const Geometry g =
      geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride);
  check_limits(g);
  check(grad, features, "grad");
  check_size(grad, {g.batch, g.channels, g.out_height, g.out_width}, "grad");
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  // One each: outputs of an operator must not share memory.
  const auto none = [&] { return torch::stable::new_empty(features, {0}); };
  const bool wants_channel = need_channel && channel_filter.has_value();
  const bool wants_spatial = need_spatial && spatial_filter.has_value();
  const Tensor grad_features =
      need_features ? empty_as(features, {g.batch, g.channels, g.height, g.width}) : none();
  const Tensor grad_channel =
      wants_channel ? torch::stable::new_empty(features, {g.batch, g.channels, g.kernel, g.kernel})
                    : none();
  const Tensor grad_spatial =
      wants_spatial
          ? empty_as(*spatial_filter, {g.batch, g.groups * g.taps(), g.out_height, g.out_width})
          : none();
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, mul, features, channel_filter, spatial_filter);
    a.grad = view_of<T>(grad);
    // The caching allocator hands a block on to later work of the same stream only, so these may
    // go before the kernels are done.
    std::vector<Tensor> scratch;
    const auto allocate = [&](int64_t floats) {
      scratch.push_back(torch::stable::new_empty(features, {floats}, ScalarType::Float));
      return static_cast<float*>(scratch.back().mutable_data_ptr());
    };
    const auto view = [](const Tensor& t) {
      return t.numel() > 0 ? writable_view_of<T>(t) : View<T>{};
    };
    const Gradients<T> to{view(grad_features), view(grad_channel), view(grad_spatial)};
    run_backward(a, to, Allocate<float>(allocate), current_stream(features));
  });
  return {grad_features, grad_channel, grad_spatial};
}

// Filters in an order of memory that the kernels know: x itself, or a contiguous copy.
struct Filters {
  NormShape shape;
  int64_t filters;
  bool channels_last;

  Filters(const Tensor& x, int64_t filters)
      : shape(norm_shape_of(x, filters)),
        filters(filters),
        channels_last(x.dim() == 4 && ddf::is_channels_last(x)) {
    constexpr int64_t limit = INT32_MAX;
    STD_TORCH_CHECK(shape.taps <= limit, "CUDA kernels serve filters of at most ", limit, " taps");
  }
  Tensor ordered(const Tensor& t) const {
    return torch::stable::contiguous(t, channels_last
                                            ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
  }
  bool is_empty() const { return shape.batch * shape.pixels == 0; }

  template <typename T>
  NormArguments<T> arguments(const Tensor& x, const OptionalTensor& std, double scale,
                             double eps) const {
    using A = Accumulate<T>;
    NormArguments<T> a{};
    a.batch = shape.batch;
    a.filters = filters;
    a.taps = shape.taps;
    a.pixels = shape.pixels;
    a.taps_inner = channels_last || shape.pixels == 1;
    a.x = static_cast<const T*>(x.const_data_ptr());
    a.std = static_cast<const A*>(data_of(std));
    a.scale = static_cast<A>(scale);
    a.eps = static_cast<A>(eps);
    return a;
  }
};

Tensor norm(const Tensor& x, int64_t filters, const OptionalTensor& std, const OptionalTensor& mean,
            double scale, double eps) {
  const Filters of(x, filters);
  check_parameter(std, x, x.size(1), "std");
  check_parameter(mean, x, x.size(1), "mean");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor result = empty_like(x, of.channels_last);
  if (of.is_empty()) return result;
  const Tensor ordered = of.ordered(x);
  const OptionalTensor factors = contiguous(std), shifts = contiguous(mean);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    NormArguments<T> a = of.template arguments<T>(ordered, factors, scale, eps);
    a.mean = static_cast<const Accumulate<T>*>(data_of(shifts));
    a.result = static_cast<T*>(result.mutable_data_ptr());
    run_norm(a, current_stream(x));
  });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                                 int64_t filters, const OptionalTensor& std,
                                                 double scale, double eps, bool need_x,
                                                 bool need_std, bool need_mean) {
  const Filters of(x, filters);
  check_parameter(std, x, x.size(1), "std");
  check_norm_grad(grad, x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor grad_x = need_x ? empty_like(x, of.channels_last) : torch::stable::new_empty(x, {0});
  Tensor grad_std = empty_parameter(x, need_std), grad_mean = empty_parameter(x, need_mean);
  if (of.is_empty()) {
    torch::stable::zero_(grad_std);
    torch::stable::zero_(grad_mean);
    return {grad_x, grad_std, grad_mean};
  }
  const Tensor ordered = of.ordered(x), ordered_grad = of.ordered(grad);
  const OptionalTensor factors = contiguous(std);
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    NormArguments<T> a = of.template arguments<T>(ordered, factors, scale, eps);
    a.grad = static_cast<const T*>(ordered_grad.const_data_ptr());
    if (need_x) a.result = static_cast<T*>(grad_x.mutable_data_ptr());
    if (need_std) a.grad_std = static_cast<A*>(grad_std.mutable_data_ptr());
    if (need_mean) a.grad_mean = static_cast<A*>(grad_mean.mutable_data_ptr());
    run_norm_backward(a, current_stream(x));
  });
  return {grad_x, grad_std, grad_mean};
}

Tensor pack(const Tensor& features, const Tensor& raw_channel, const Tensor& raw_spatial,
            const OptionalTensor& channel_std, double channel_scale, double spatial_scale,
            double eps, const OptionalTensor& bias, bool relu, int64_t kernel_size,
            int64_t dilation, int64_t stride, bool mul) {
  const Geometry g = pack_geometry_of(features, raw_channel, raw_spatial, channel_std, bias,
                                      kernel_size, dilation, stride);
  check_limits(g);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor out = empty_as(features, {g.batch, g.channels, g.out_height, g.out_width});
  if (out.numel() == 0) return out;
  const Tensor channel = torch::stable::contiguous(raw_channel);
  const Tensor spatial = Filters(raw_spatial, g.groups).ordered(raw_spatial);
  const OptionalTensor std = contiguous(channel_std), shift = contiguous(bias);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulate<T>;
    Arguments<T> a = arguments_of<T>(g, mul, features, channel, spatial);
    a.result = writable_view_of<T>(out);
    a.around.channel_scale = static_cast<A>(channel_scale);
    a.around.spatial_scale = static_cast<A>(spatial_scale);
    a.around.eps = static_cast<A>(eps);
    a.around.channel_std = static_cast<const A*>(data_of(std));
    a.around.bias = static_cast<const A*>(data_of(shift));
    if (relu) a.around.floor = 0;
    std::vector<Tensor> scratch;
    const auto allocate = [&](int64_t elements) {
      scratch.push_back(torch::stable::new_empty(features, {elements}));
      return static_cast<T*>(scratch.back().mutable_data_ptr());
    };
    run_pack(a, Allocate<T>(allocate), current_stream(features));
  });
  return out;
}

int64_t subpixel_stride(const OptionalTensor& filter) { return filter ? filter->stride(1) : 0; }

Tensor up_forward(const Tensor& features, const OptionalTensor& channel_filter,
                  const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t scale_factor,
                  int64_t dilation, bool mul) {
  const Geometry g =
      up_geometry_of(features, channel_filter, spatial_filter, kernel_size, scale_factor, dilation);
  check_limits(g);
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor out =
      empty_as(features, {g.batch, g.channels, g.scale * g.out_height, g.scale * g.out_width});
  if (out.numel() == 0) return out;
  const SubpixelStrides strides{subpixel_stride(channel_filter), subpixel_stride(spatial_filter)};
  const cudaStream_t stream = current_stream(features);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, mul, features, channel_filter, spatial_filter);
    a.result = writable_view_of<T>(out);
    if (run_up_window3(a, strides, stream)) return;
    for_each_subpixel(a, strides,
                      [&](const Arguments<T>& call, int64_t) { run_forward(call, stream); });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> up_backward(const Tensor& grad, const Tensor& features,
                                               const OptionalTensor& channel_filter,
                                               const OptionalTensor& spatial_filter,
                                               int64_t kernel_size, int64_t scale_factor,
                                               int64_t dilation, bool mul, bool need_features,
                                               bool need_channel, bool need_spatial) {
  const Geometry g =
      up_geometry_of(features, channel_filter, spatial_filter, kernel_size, scale_factor, dilation);
  check_limits(g);
  check(grad, features, "grad");
  check_size(grad, {g.batch, g.channels, g.scale * g.out_height, g.scale * g.out_width}, "grad");
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const auto gradient = [&](bool need, const std::vector<int64_t>& size) {
    return torch::stable::new_empty(features, need ? size : std::vector<int64_t>{0});
  };
  const int64_t n = g.subpixels();
  const Tensor grad_features = need_features
                                   ? empty_as(features, {g.batch, g.channels, g.height, g.width})
                                   : gradient(false, {});
  const Tensor grad_channel =
      gradient(need_channel && channel_filter, {g.batch, n, g.channels, g.kernel, g.kernel});
  const Tensor grad_spatial = gradient(
      need_spatial && spatial_filter, {g.batch, n, g.groups * g.taps(), g.out_height, g.out_width});
  if (grad.numel() == 0) return {grad_features, grad_channel, grad_spatial};
  const SubpixelStrides strides{subpixel_stride(channel_filter), subpixel_stride(spatial_filter)};
  const cudaStream_t stream = current_stream(features);
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, mul, features, channel_filter, spatial_filter);
    a.grad = view_of<T>(grad);
    if (grad_features.numel() > 0) {
      a.result = writable_view_of<T>(grad_features);
      run_up_grad_features(a, strides, stream);
    }
    Gradients<T> to{};
    SubpixelStrides to_strides{};
    if (grad_channel.numel() > 0) {
      to.channel_filter = writable_view_of<T>(grad_channel);
      to_strides.channel_filter = grad_channel.stride(1);
    }
    if (grad_spatial.numel() > 0) {
      to.spatial_filter = writable_view_of<T>(grad_spatial);
      to_strides.spatial_filter = grad_spatial.stride(1);
    }
    if (to.channel_filter.data == nullptr && to.spatial_filter.data == nullptr) return;
    a.result = View<T>{};
    for_each_subpixel(a, strides, [&](const Arguments<T>& call, int64_t r) {
      std::vector<Tensor> scratch;
      const auto allocate = [&](int64_t floats) {
        scratch.push_back(torch::stable::new_empty(features, {floats}, ScalarType::Float));
        return static_cast<float*>(scratch.back().mutable_data_ptr());
      };
      run_backward(call, filter_grads_of(to, to_strides, r), Allocate<float>(allocate), stream);
    });
  });
  return {grad_features, grad_channel, grad_spatial};
}

}  // namespace
}  // namespace ddf::cuda

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CUDA, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cuda::forward));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cuda::backward));
  m.impl("filter_norm", TORCH_BOX(&ddf::cuda::norm));
  m.impl("filter_norm_backward", TORCH_BOX(&ddf::cuda::norm_backward));
  m.impl("ddf_pack", TORCH_BOX(&ddf::cuda::pack));
  m.impl("ddf_up", TORCH_BOX(&ddf::cuda::up_forward));
  m.impl("ddf_up_backward", TORCH_BOX(&ddf::cuda::up_backward));
}
