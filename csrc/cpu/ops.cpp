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

SpatialStrides strides_of(const Tensor& spatial) {
  return {spatial.stride(0), spatial.stride(1), spatial.stride(2), spatial.stride(3)};
}

bool is_empty(const Geometry& g) {
  return g.batch * g.channels * g.out_height * g.out_width == 0 || g.height * g.width == 0;
}

Tensor forward(const Tensor& features, const OptionalTensor& channel_filter,
               const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation,
               int64_t stride, bool mul) {
  Forward f{};
  f.geometry = geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride);
  const Geometry& g = f.geometry;
  f.dtype = dtype_of(features);
  f.mul = mul;
  f.channels_last = is_channels_last(features);
  Tensor output =
      empty(features, {g.batch, g.channels, g.out_height, g.out_width}, f.channels_last);
  if (is_empty(g)) return output;

  const Tensor x = in_layout(features, f.channels_last);
  const OptionalTensor cf =
      channel_filter ? OptionalTensor(in_layout(*channel_filter, false)) : std::nullopt;
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

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& features,
                                            const OptionalTensor& channel_filter,
                                            const OptionalTensor& spatial_filter,
                                            int64_t kernel_size, int64_t dilation, int64_t stride,
                                            bool mul, bool need_features, bool need_channel,
                                            bool need_spatial) {
  Backward b{};
  b.geometry = geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, stride);
  const Geometry& g = b.geometry;
  check(grad, features, "grad");
  check_size(grad, {g.batch, g.channels, g.out_height, g.out_width}, "grad");
  b.dtype = dtype_of(features);
  b.mul = mul;
  b.channels_last = is_channels_last(features);
  need_channel = need_channel && channel_filter;
  need_spatial = need_spatial && spatial_filter;

  const std::vector<int64_t> none{0};
  const std::vector<int64_t> size{g.batch, g.channels, g.height, g.width};
  Tensor grad_features =
      need_features ? empty(features, size, b.channels_last) : empty(features, none, false);
  Tensor grad_channel = need_channel
                            ? empty(features, {g.batch, g.channels, g.kernel, g.kernel}, false)
                            : empty(features, none, false);
  Tensor grad_spatial =
      need_spatial ? empty(features, {g.batch, g.groups * g.taps(), g.out_height, g.out_width},
                           is_channels_last(*spatial_filter))
                   : empty(features, none, false);
  if (is_empty(g) || !(need_features || need_channel || need_spatial))
    return {grad_features, grad_channel, grad_spatial};

  const Tensor x = in_layout(features, b.channels_last);
  const Tensor dy = in_layout(grad, b.channels_last);
  const OptionalTensor cf =
      channel_filter ? OptionalTensor(in_layout(*channel_filter, false)) : std::nullopt;
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
  check_parameter(std, x, "std");
  check_parameter(mean, x, "mean");
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
  check_parameter(std, x, "std");
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

}  // namespace
}  // namespace ddf::cpu

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CPU, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cpu::forward));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cpu::backward));
  m.impl("filter_norm", TORCH_BOX(&ddf::cpu::filter_norm));
  m.impl("filter_norm_backward", TORCH_BOX(&ddf::cpu::filter_norm_backward));
}
