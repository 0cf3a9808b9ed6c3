// The CUDA kernels of the operators whose schemas are in ../ops.cpp.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "dispatch.cuh"

namespace ddf::cuda {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename... Parameters, typename... Given>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                  size_t shared_bytes, const Given&... given) const {
    STD_TORCH_CHECK(blocks <= kMaxBlocks, name, ": the tensors need ", blocks,
                    " blocks, CUDA allows ", kMaxBlocks);
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, stream_>>>(given...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, name,
                    ": the kernel did not start: ", cudaGetErrorString(error));
  }

 private:
  cudaStream_t stream_;
};

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

bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// Uninitialised, of `like`'s dtype, device and layout, channels_last or else contiguous.
Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes) {
  const auto format =
      is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              format);
}

template <typename T>
View<const T> view_of(const Tensor& t) {
  return {static_cast<const T*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.stride(3)};
}

template <typename T>
View<const T> view_of(const OptionalTensor& t) {
  return t.has_value() ? view_of<T>(*t) : View<const T>{};
}

template <typename T>
View<T> writable_view_of(const Tensor& t) {
  return {static_cast<T*>(t.mutable_data_ptr()), t.stride(0), t.stride(1), t.stride(2),
          t.stride(3)};
}

void check_like(const char* name, const Tensor& tensor, const Tensor& features) {
  STD_TORCH_CHECK(tensor.dim() == 4, name, " must have 4 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == features.scalar_type(), name,
                  " must have the dtype of features, ",
                  torch::headeronly::toString(features.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == features.get_device_index(),
                  name, " must be on the device of features");
  STD_TORCH_CHECK(tensor.size(0) == features.size(0), name, " must have the batch of features, ",
                  features.size(0), ", got ", tensor.size(0));
}

// Only what keeps the kernels inside their tensors: ddf_mm.ops.ddf says what is wrong in full.
Geometry geometry_of(const Tensor& features, const OptionalTensor& channel_filter,
                     const OptionalTensor& spatial_filter, int64_t kernel, int64_t dilation,
                     int64_t stride) {
  STD_TORCH_CHECK(features.dim() == 4, "features must have 4 dimensions, got ", features.dim());
  STD_TORCH_CHECK(kernel > 0 && kernel % 2 == 1 && dilation > 0 && stride > 0,
                  "kernel_size must be odd, and dilation and stride at least 1, got ", kernel, ", ",
                  dilation, " and ", stride);
  Geometry g;
  g.batch = features.size(0), g.channels = features.size(1);
  g.height = features.size(2), g.width = features.size(3);
  g.kernel = kernel, g.dilation = dilation, g.stride = stride;
  g.groups = 1;
  g.out_height = ceil_div(g.height, stride), g.out_width = ceil_div(g.width, stride);
  STD_TORCH_CHECK(channel_filter.has_value() || spatial_filter.has_value(),
                  "channel_filter and spatial_filter are both None; at least one must be given");
  if (channel_filter.has_value()) {
    check_like("channel_filter", *channel_filter, features);
    STD_TORCH_CHECK(channel_filter->size(1) == g.channels && channel_filter->size(2) == kernel &&
                        channel_filter->size(3) == kernel,
                    "channel_filter must be a Tensor[B, C, k, k] with C = ", g.channels,
                    " and k = ", kernel);
  }
  if (spatial_filter.has_value()) {
    check_like("spatial_filter", *spatial_filter, features);
    g.groups = spatial_filter->size(1) / g.taps();
    STD_TORCH_CHECK(
        g.groups > 0 && spatial_filter->size(1) % g.taps() == 0 && g.channels % g.groups == 0,
        "spatial_filter must have groups * kernel_size**2 channels with groups that "
        "divide the ",
        g.channels, " channels of features, got ", spatial_filter->size(1));
    g.out_height = spatial_filter->size(2), g.out_width = spatial_filter->size(3);
  }
  g.group_channels = g.channels / g.groups;
  // Rows, columns and the pixels of one channel are counted in 32 bits; elements are not.
  constexpr int64_t limit = INT32_MAX / 4;
  STD_TORCH_CHECK(g.height <= limit && g.width <= limit && g.height * g.width <= limit &&
                      g.channels <= limit && kernel <= limit && dilation <= limit &&
                      kernel * dilation <= limit && stride <= limit,
                  "CUDA kernels serve images of at most ", limit,
                  " pixels, and as many channels, kernel_size * dilation and stride");
  return g;
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
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor out = empty_as(features, {g.batch, g.channels, g.out_height, g.out_width});
  if (out.numel() == 0) return out;
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    Arguments<T> a = arguments_of<T>(g, mul, features, channel_filter, spatial_filter);
    a.result = writable_view_of<T>(out);
    launch_forward(a, Launcher(features));
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
  check_like("grad", grad, features);
  STD_TORCH_CHECK(
      grad.size(1) == g.channels && grad.size(2) == g.out_height && grad.size(3) == g.out_width,
      "grad must have the shape of the output, [", g.batch, ", ", g.channels, ", ", g.out_height,
      ", ", g.out_width, "]");
  const torch::stable::accelerator::DeviceGuard guard(features.get_device_index());
  const Tensor none = torch::stable::new_empty(features, {0});
  const bool wants_channel = need_channel && channel_filter.has_value();
  const bool wants_spatial = need_spatial && spatial_filter.has_value();
  const Tensor grad_features =
      need_features ? empty_as(features, {g.batch, g.channels, g.height, g.width}) : none;
  const Tensor grad_channel =
      wants_channel ? torch::stable::new_empty(features, {g.batch, g.channels, g.kernel, g.kernel})
                    : none;
  const Tensor grad_spatial =
      wants_spatial
          ? empty_as(*spatial_filter, {g.batch, g.groups * g.taps(), g.out_height, g.out_width})
          : none;
  with_type(features.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Launcher launch(features);
    Arguments<T> a = arguments_of<T>(g, mul, features, channel_filter, spatial_filter);
    a.grad = view_of<T>(grad);
    if (grad_features.numel() > 0) {
      a.result = writable_view_of<T>(grad_features);
      launch_grad_features(a, launch);
    }
    if (grad_channel.numel() > 0 || grad_spatial.numel() > 0) {
      Tensor scratch;
      const auto allocate = [&](int64_t floats) {
        scratch = torch::stable::new_empty(features, {floats}, ScalarType::Float);
        return static_cast<float*>(scratch.mutable_data_ptr());
      };
      const auto view = [](const Tensor& t) {
        return t.numel() > 0 ? writable_view_of<T>(t) : View<T>{};
      };
      launch_filter_grads(a, view(grad_channel), view(grad_spatial), allocate, launch);
    }
  });
  return {grad_features, grad_channel, grad_spatial};
}

}  // namespace
}  // namespace ddf::cuda

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CUDA, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cuda::forward));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cuda::backward));
}
