// Registers the CPU kernels: checks what they rely on, makes the outputs, picks the instruction
// set.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/arguments.h"
#include "tensors.h"

namespace ddf::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    // A name of a smaller instruction set than the processor's, for tests.
    const char* name = std::getenv("DDF_MM_CPU_ISA");
    const std::string asked = name ? name : "";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && asked != "avx2" && asked != "baseline") return avx512_kernels;
    if (avx2 && asked != "baseline") return avx2_kernels;
#endif
    return baseline_kernels;
  }();
  return chosen;
}

void run_in_parallel(int64_t count, Body body, void* context) {
  torch::stable::parallel_for(0, count, 1,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, "ddf: features must be float16, bfloat16, float32 or float64");
  }
}

Tensor in_layout(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// With a dimension of subpixels, or without.
SpatialStrides strides_of(const Tensor& spatial) {
  const int64_t last = spatial.dim() - 1;
  return {spatial.stride(0), last == 4 ? spatial.stride(1) : 0, spatial.stride(last - 2),
          spatial.stride(last - 1), spatial.stride(last)};
}

bool is_empty(const Geometry& g) {
  return g.batch * g.channels * g.out_height * g.out_width == 0 || g.height * g.width == 0;
}

std::vector<int64_t> output_size(const Geometry& g) {
  return {g.batch, g.channels, g.scale * g.out_height, g.scale * g.out_width};
}

Tensor forward_of(const Geometry& g, const Tensor& features, const OptionalTensor& channel_filter,
                  const OptionalTensor& spatial_filter, bool mul, const Surroundings& around = {}) {
  Forward f{};
  f.geometry = g;
  f.around = around;
  f.dtype = dtype_of(features);
  f.mul = mul;
  f.channels_last = is_channels_last(features);
  Tensor output = empty(features, output_size(g), f.channels_last);
  if (is_empty(g)) return output;

  const Tensor x = in_layout(features, f.channels_last);
  const OptionalTensor cf = contiguous(channel_filter);
  f.features = x.const_data_ptr();
  f.channel_filter = cf ? cf->const_data_ptr() : nullptr;
  if (spatial_filter) {
    f.spatial_filter = spatial_filter->const_data_ptr();
    f.spatial_strides = strides_of(*spatial_filter);
  }
  f.output = output.mutable_data_ptr();
  kernels().forward(f, run_in_parallel);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_of(const Geometry& g, const Tensor& grad,
                                               const Tensor& features,
                                               const OptionalTensor& channel_filter,
                                               const OptionalTensor& spatial_filter, bool mul,
                                               bool need_features, bool need_channel,
                                               bool need_spatial) {
  Backward b{};
  b.geometry = g;
  check(grad, features, "grad");
  check_size(grad, output_size(g), "grad");
  b.dtype = dtype_of(features);
  b.mul = mul;
  b.channels_last = is_channels_last(features);
  need_channel = need_channel && channel_filter;
  need_spatial = need_spatial && spatial_filter;

  const auto gradient = [&](bool need, const Tensor& of, bool channels_last) {
    if (!need) return empty(features, {0}, false);
    std::vector<int64_t> size;
    for (int64_t i = 0; i < of.dim(); ++i) size.push_back(of.size(i));
    return empty(features, size, channels_last);
  };
  Tensor grad_features = gradient(need_features, features, b.channels_last);
  Tensor grad_channel = gradient(need_channel, need_channel ? *channel_filter : features, false);
  Tensor grad_spatial =
      gradient(need_spatial, need_spatial ? *spatial_filter : features,
               need_spatial && spatial_filter->dim() == 4 && is_channels_last(*spatial_filter));
  if (is_empty(g) || !(need_features || need_channel || need_spatial))
    return {grad_features, grad_channel, grad_spatial};

  const Tensor x = in_layout(features, b.channels_last);
  const Tensor dy = in_layout(grad, b.channels_last);
  const OptionalTensor cf = contiguous(channel_filter);
  b.grad = dy.const_data_ptr();
  b.features = x.const_data_ptr();
  b.channel_filter = cf ? cf->const_data_ptr() : nullptr;
  if (spatial_filter) {
    b.spatial_filter = spatial_filter->const_data_ptr();
    b.spatial_strides = strides_of(*spatial_filter);
  }
  b.grad_features = need_features ? grad_features.mutable_data_ptr() : nullptr;
  b.grad_channel = need_channel ? grad_channel.mutable_data_ptr() : nullptr;
  if (need_spatial) {
    b.grad_spatial = grad_spatial.mutable_data_ptr();
    b.grad_spatial_strides = strides_of(grad_spatial);
  }
  kernels().backward(b, run_in_parallel);
  return {grad_features, grad_channel, grad_spatial};
}

// Filters as the kernels take them: x as it is, where its order of memory is one that they know,
// or a contiguous copy.
struct Filters {
  NormSizes sizes;
  bool channels_last;

  Filters(const Tensor& x, int64_t filters) : channels_last(x.dim() == 4 && is_channels_last(x)) {
    const NormShape shape = norm_shape_of(x, filters);
    sizes = {shape.batch, filters, shape.taps, shape.pixels, channels_last || shape.pixels == 1};
  }
  Tensor ordered(const Tensor& t) const {
    return t.dim() == 4 ? in_layout(t, channels_last) : torch::stable::contiguous(t);
  }
  bool is_empty() const { return sizes.batch * sizes.pixels == 0; }
};

Tensor filter_norm(const Tensor& x, int64_t filters, const OptionalTensor& std,
                   const OptionalTensor& mean, double scale, double eps) {
  const Filters of(x, filters);
  check_parameter(std, x, x.size(1), "std");
  check_parameter(mean, x, x.size(1), "mean");
  const Tensor result = empty_like(x, of.channels_last);
  if (of.is_empty()) return result;
  const Tensor ordered = of.ordered(x);
  const OptionalTensor factors = contiguous(std), shifts = contiguous(mean);
  kernels().norm({of.sizes, dtype_of(x), ordered.const_data_ptr(), data_of(factors),
                  data_of(shifts), scale, eps, result.mutable_data_ptr()},
                 run_in_parallel);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> filter_norm_backward(const Tensor& grad, const Tensor& x,
                                                        int64_t filters, const OptionalTensor& std,
                                                        double scale, double eps, bool need_x,
                                                        bool need_std, bool need_mean) {
  const Filters of(x, filters);
  check_parameter(std, x, x.size(1), "std");
  check_norm_grad(grad, x);
  const Tensor grad_x = need_x ? empty_like(x, of.channels_last) : empty(x, {0}, false);
  Tensor grad_std = empty_parameter(x, need_std), grad_mean = empty_parameter(x, need_mean);
  if (of.is_empty()) {
    torch::stable::zero_(grad_std);
    torch::stable::zero_(grad_mean);
    return {grad_x, grad_std, grad_mean};
  }
  const Tensor ordered = of.ordered(x), ordered_grad = of.ordered(grad);
  const OptionalTensor factors = contiguous(std);
  kernels().norm_backward(
      {of.sizes, dtype_of(x), ordered_grad.const_data_ptr(), ordered.const_data_ptr(),
       data_of(factors), scale, eps, need_x ? grad_x.mutable_data_ptr() : nullptr,
       need_std ? grad_std.mutable_data_ptr() : nullptr,
       need_mean ? grad_mean.mutable_data_ptr() : nullptr},
      run_in_parallel);
  return {grad_x, grad_std, grad_mean};
}

Tensor forward(const Tensor& features, const OptionalTensor& channel_filter,
               const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation,
               int64_t stride, bool mul) {
  return forward_of(
      geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride),
      features, channel_filter, spatial_filter, mul);
}

Tensor up_forward(const Tensor& features, const OptionalTensor& channel_filter,
                  const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t scale_factor,
                  int64_t dilation, bool mul) {
  return forward_of(
      up_geometry_of(features, channel_filter, spatial_filter, kernel_size, scale_factor, dilation),
      features, channel_filter, spatial_filter, mul);
}

Tensor pack(const Tensor& features, const Tensor& raw_channel, const Tensor& raw_spatial,
            const OptionalTensor& channel_std, double channel_scale, double spatial_scale,
            double eps, const OptionalTensor& bias, bool relu, int64_t kernel_size,
            int64_t dilation, int64_t stride, bool mul) {
  const Geometry g = pack_geometry_of(features, raw_channel, raw_spatial, channel_std, bias,
                                      kernel_size, dilation, stride);
  const OptionalTensor std = contiguous(channel_std), shift = contiguous(bias);
  return forward_of(g, features, raw_channel, raw_spatial, mul,
                    {true, channel_scale, spatial_scale, eps, data_of(std), data_of(shift), relu});
}

Tensor depthwise_pointwise(const Tensor& features, const Tensor& depthwise,
                           const OptionalTensor& depthwise_bias, const Tensor& pointwise,
                           const OptionalTensor& pointwise_bias) {
  check(features, features, "features");
  check(depthwise, features, "depthwise");
  check(pointwise, features, "pointwise");
  Branches b{};
  b.batch = features.size(0);
  b.channels = features.size(1);
  b.height = features.size(2);
  b.width = features.size(3);
  b.kernel = depthwise.size(2);
  STD_TORCH_CHECK(b.channels >= 1 && depthwise.size(0) >= 1 && depthwise.size(0) % b.channels == 0,
                  "ddf: depthwise must have a multiple of ", b.channels, " filters, got ",
                  depthwise.size(0));
  b.branches = depthwise.size(0) / b.channels;
  STD_TORCH_CHECK(b.kernel % 2 == 1, "ddf: depthwise must have an odd size, got ", b.kernel);
  check_size(depthwise, {b.branches * b.channels, 1, b.kernel, b.kernel}, "depthwise");
  STD_TORCH_CHECK(pointwise.size(0) >= 1 && pointwise.size(0) % b.branches == 0,
                  "ddf: pointwise must have a multiple of ", b.branches, " filters, got ",
                  pointwise.size(0));
  check_size(pointwise, {pointwise.size(0), b.channels, 1, 1}, "pointwise");
  b.outputs = pointwise.size(0) / b.branches;
  const auto check_bias = [&](const OptionalTensor& bias, int64_t size, const char* name) {
    if (!bias) return;
    check(*bias, features, name, 1);
    check_size(*bias, {size}, name);
  };
  check_bias(depthwise_bias, depthwise.size(0), "depthwise_bias");
  check_bias(pointwise_bias, pointwise.size(0), "pointwise_bias");
  b.dtype = dtype_of(features);
  Tensor output = empty(features, {b.batch, pointwise.size(0), b.height, b.width}, true);
  if (b.batch * b.height * b.width == 0) return output;
  const Tensor x = in_layout(features, true);
  const Tensor dw = in_layout(depthwise, false), pw = in_layout(pointwise, false);
  const OptionalTensor dw_bias = contiguous(depthwise_bias), pw_bias = contiguous(pointwise_bias);
  b.x = x.const_data_ptr();
  b.depthwise = dw.const_data_ptr();
  b.depthwise_bias = data_of(dw_bias);
  b.pointwise = pw.const_data_ptr();
  b.pointwise_bias = data_of(pw_bias);
  b.output = output.mutable_data_ptr();
  kernels().branches(b, run_in_parallel);
  return output;
}

std::tuple<Tensor, Tensor> pointwise_pool(const Tensor& features, const Tensor& weight,
                                          const OptionalTensor& bias, int64_t stride) {
  check(features, features, "features");
  check(weight, features, "weight");
  STD_TORCH_CHECK(stride >= 1, "ddf: stride must be at least 1, got ", stride);
  Project p{};
  p.batch = features.size(0);
  p.channels = features.size(1);
  p.height = features.size(2);
  p.width = features.size(3);
  STD_TORCH_CHECK(p.channels * p.height * p.width * weight.size(0) > 0,
                  "ddf: features must have a channel, a row and a column, weight an output");
  p.outputs = weight.size(0);
  p.stride = stride;
  check_size(weight, {p.outputs, p.channels, 1, 1}, "weight");
  if (bias) {
    check(*bias, features, "bias", 1);
    check_size(*bias, {p.outputs}, "bias");
  }
  p.dtype = dtype_of(features);
  // In this order: a stride near the largest integer does not overflow.
  const std::vector<int64_t> size = {p.batch, p.outputs, (p.height - 1) / stride + 1,
                                     (p.width - 1) / stride + 1};
  Tensor output = empty(features, size, true);
  Tensor mean = empty(features, {p.batch, p.channels}, false);
  if (p.batch == 0) return {output, mean};
  p.stride = std::min(stride, std::max(p.height, p.width));
  const Tensor x = in_layout(features, true), w = in_layout(weight, false);
  const OptionalTensor b = contiguous(bias);
  p.x = x.const_data_ptr();
  p.weight = w.const_data_ptr();
  p.bias = data_of(b);
  p.output = output.mutable_data_ptr();
  p.mean = mean.mutable_data_ptr();
  kernels().project(p, run_in_parallel);
  return {output, mean};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& features,
                                            const OptionalTensor& channel_filter,
                                            const OptionalTensor& spatial_filter,
                                            int64_t kernel_size, int64_t dilation, int64_t stride,
                                            bool mul, bool need_features, bool need_channel,
                                            bool need_spatial) {
  return backward_of(
      geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride), grad,
      features, channel_filter, spatial_filter, mul, need_features, need_channel, need_spatial);
}

std::tuple<Tensor, Tensor, Tensor> up_backward(const Tensor& grad, const Tensor& features,
                                               const OptionalTensor& channel_filter,
                                               const OptionalTensor& spatial_filter,
                                               int64_t kernel_size, int64_t scale_factor,
                                               int64_t dilation, bool mul, bool need_features,
                                               bool need_channel, bool need_spatial) {
  return backward_of(
      up_geometry_of(features, channel_filter, spatial_filter, kernel_size, scale_factor, dilation),
      grad, features, channel_filter, spatial_filter, mul, need_features, need_channel,
      need_spatial);
}

}  // namespace
}  // namespace ddf::cpu

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CPU, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cpu::forward));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cpu::backward));
  m.impl("filter_norm", TORCH_BOX(&ddf::cpu::filter_norm));
  m.impl("filter_norm_backward", TORCH_BOX(&ddf::cpu::filter_norm_backward));
  m.impl("ddf_pack", TORCH_BOX(&ddf::cpu::pack));
  m.impl("pointwise_pool", TORCH_BOX(&ddf::cpu::pointwise_pool));
  m.impl("depthwise_pointwise", TORCH_BOX(&ddf::cpu::depthwise_pointwise));
  m.impl("ddf_up", TORCH_BOX(&ddf::cpu::up_forward));
  m.impl("ddf_up_backward", TORCH_BOX(&ddf::cpu::up_backward));
}
