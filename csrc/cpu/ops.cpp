// Registers the CPU kernels: checks what they rely on, makes the outputs, picks the instruction
// set.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/arguments.h"

namespace ddf::cpu {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

// Stored with the channels innermost, and not also contiguous (as one pixel or one channel is).
bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  const int64_t expected[4] = {height * width * channels, 1, width * channels, channels};
  for (int i = 0; i < 4; ++i)
    if (t.size(i) != 1 && t.stride(i) != expected[i]) return false;
  return true;
}

Tensor in_layout(const Tensor& t, bool channels_last) {
  return torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor empty(const Tensor& like, const std::vector<int64_t>& size, bool channels_last) {
  return torch::stable::empty(
      size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

SpatialStrides strides_of(const Tensor& spatial) {
  return {spatial.stride(0), spatial.stride(1), spatial.stride(2), spatial.stride(3)};
}

void check(const Tensor& tensor, const Tensor& features, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4, "ddf: ", name, " must have 4 dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == features.scalar_type(), "ddf: ", name,
                  " must have the dtype of features");
  STD_TORCH_CHECK(tensor.device() == features.device(), "ddf: ", name,
                  " must be on the device of features");
}

void check_size(const Tensor& tensor, const std::vector<int64_t>& size, const char* name) {
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(tensor.size(i) == size[i], "ddf: ", name, " must have size ", size[i],
                    " in dimension ", i, ", got ", tensor.size(i));
}

// ddf_mm.ops.ddf has told users of bad arguments in its own words; these checks keep a direct call
// of the operator from reading out of bounds.
Geometry geometry_of(const Tensor& features, const OptionalTensor& channel_filter,
                     const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation,
                     int64_t stride) {
  STD_TORCH_CHECK(kernel_size >= 1 && kernel_size % 2 == 1, "ddf: kernel_size must be odd, got ",
                  kernel_size);
  STD_TORCH_CHECK(dilation >= 1 && stride >= 1, "ddf: dilation and stride must be at least 1, got ",
                  dilation, " and ", stride);
  STD_TORCH_CHECK(channel_filter || spatial_filter,
                  "ddf: channel_filter and spatial_filter are both None");
  check(features, features, "features");
  Geometry g;
  g.batch = features.size(0);
  g.channels = features.size(1);
  g.height = features.size(2);
  g.width = features.size(3);
  g.kernel = kernel_size;
  g.dilation = dilation;
  g.stride = stride;
  g.out_height = (g.height + stride - 1) / stride;
  g.out_width = (g.width + stride - 1) / stride;
  g.groups = 1;
  if (channel_filter) {
    check(*channel_filter, features, "channel_filter");
    check_size(*channel_filter, {g.batch, g.channels, kernel_size, kernel_size}, "channel_filter");
  }
  if (spatial_filter) {
    check(*spatial_filter, features, "spatial_filter");
    const int64_t rows = spatial_filter->size(2), columns = spatial_filter->size(3);
    STD_TORCH_CHECK(rows == g.out_height || rows == g.height / stride, "ddf: spatial_filter has ",
                    rows, " rows for ", g.height, " of features");
    STD_TORCH_CHECK(columns == g.out_width || columns == g.width / stride,
                    "ddf: spatial_filter has ", columns, " columns for ", g.width, " of features");
    g.out_height = rows;
    g.out_width = columns;
    g.groups = spatial_filter->size(1) / g.taps();
    STD_TORCH_CHECK(g.groups >= 1 && g.groups * g.taps() == spatial_filter->size(1) &&
                        g.channels % g.groups == 0,
                    "ddf: spatial_filter has ", spatial_filter->size(1), " channels for ",
                    g.channels, " of features and kernel_size ", kernel_size);
    check_size(*spatial_filter, {g.batch, g.groups * g.taps(), rows, columns}, "spatial_filter");
  }
  g.group_channels = g.channels / g.groups;
  return g;
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

}  // namespace
}  // namespace ddf::cpu

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CPU, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cpu::forward));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cpu::backward));
}
