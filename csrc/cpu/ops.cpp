// The CPU implementations of the operators: checks, allocation, choice of the instruction set.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/arguments.h"
#include "tensors.h"

namespace ddf::cpu {
namespace {

using torch::headeronly::ScalarType;

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__x86_64__)
    // For tests: a smaller instruction set than the processor has.
    const char* name = std::getenv("DDF_MM_CPU_ISA");
    const std::string wanted = name ? name : "";
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && wanted != "avx2" && wanted != "baseline") return avx512_kernels;
    if (avx2 && wanted != "baseline") return avx2_kernels;
#endif
    return baseline_kernels;
  }();
  return chosen;
}

// Exceptions of body are rethrown here, because LibTorch's C interface drops them.
void run_in_parallel(int64_t count, Body body, void* context) {
  std::exception_ptr thrown;
  std::mutex mutex;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      body(begin, end, context);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

template <class Arguments>
void run(void (*kernel)(const Arguments&, ParallelFor), const Arguments& arguments) {
  try {
    kernel(arguments, run_in_parallel);
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, "ddf_mm: can't allocate memory for intermediate results");
  }
}

// tensor has passed check_dtype.
DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::Half:
      return DType::f16;
    default:
      return DType::bf16;
  }
}

// With or without a dimension of subpixels.
SpatialStrides strides_of(const Tensor& spatial) {
  const int64_t last = spatial.dim() - 1;
  return {spatial.stride(0), last == 4 ? spatial.stride(1) : 0, spatial.stride(last - 2),
          spatial.stride(last - 1), spatial.stride(last)};
}

Tensor forward_of(const Geometry& g, const Tensor& features, const OptionalTensor& channel_filter,
                  const OptionalTensor& spatial_filter, CombineMode combine,
                  const PackOptions& pack = {}) {
  Forward f{};
  f.geometry = g;
  f.pack = pack;
  f.dtype = dtype_of(features);
  f.combine = combine;
  f.channels_last = is_channels_last(features);
  Tensor output = empty(features, output_size(g), f.channels_last);
  if (output.numel() == 0) return output;

  const Tensor x = in_layout(features, f.channels_last);
  const OptionalTensor cf = contiguous(channel_filter);
  f.features = x.const_data_ptr();
  f.channel_filter = cf ? cf->const_data_ptr() : nullptr;
  if (spatial_filter) {
    f.spatial_filter = spatial_filter->const_data_ptr();
    f.spatial_strides = strides_of(*spatial_filter);
  }
  f.output = output.mutable_data_ptr();
  run(kernels().forward, f);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_of(const Geometry& g, const Tensor& grad,
                                               const Tensor& features,
                                               const OptionalTensor& channel_filter,
                                               const OptionalTensor& spatial_filter,
                                               CombineMode combine, bool need_features,
                                               bool need_channel, bool need_spatial) {
  const DDFGradients grads(g, grad, features, channel_filter, spatial_filter, need_features,
                           need_channel, need_spatial);
  if (grads.is_empty()) return {grads.features, grads.channel_filter, grads.spatial_filter};
  Backward b{};
  b.geometry = g;
  b.dtype = dtype_of(features);
  b.combine = combine;
  b.channels_last = is_channels_last(features);
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
  b.grad_features = grads.need_features ? grads.features.mutable_data_ptr() : nullptr;
  b.grad_channel = grads.need_channel ? grads.channel_filter.mutable_data_ptr() : nullptr;
  if (grads.need_spatial) {
    b.grad_spatial = grads.spatial_filter.mutable_data_ptr();
    b.grad_spatial_strides = strides_of(grads.spatial_filter);
  }
  run(kernels().backward, b);
  return {grads.features, grads.channel_filter, grads.spatial_filter};
}

FilterNormSizes sizes_of(const FilterNormGeometry& g) {
  return {g.batch, g.filters, g.taps, g.pixels, g.has_taps_inner()};
}

Tensor filter_norm(const Tensor& x, int64_t filters, const OptionalTensor& std,
                   const OptionalTensor& mean, double scale, double eps) {
  const FilterNormGeometry g(x, filters, std);
  check_parameter(mean, x, x.size(1), "mean", "x");
  const Tensor result = empty(x, size_of(x), g.channels_last);
  if (g.is_empty()) return result;
  const Tensor ordered = g.ordered(x);
  const OptionalTensor factors = contiguous(std), shifts = contiguous(mean);
  run(kernels().filter_norm, {sizes_of(g), dtype_of(x), ordered.const_data_ptr(), data_of(factors),
                              data_of(shifts), scale, eps, result.mutable_data_ptr()});
  return result;
}

std::tuple<Tensor, Tensor, Tensor> filter_norm_backward(const Tensor& grad, const Tensor& x,
                                                        int64_t filters, const OptionalTensor& std,
                                                        double scale, double eps, bool need_x,
                                                        bool need_std, bool need_mean) {
  const FilterNormGeometry g(x, filters, std);
  check_like(grad, x, "grad", size_of(x), "x");
  const FilterNormGradients grads(g, x, need_x, need_std, need_mean);
  if (g.is_empty()) return {grads.x, grads.std, grads.mean};
  const Tensor ordered = g.ordered(x), ordered_grad = g.ordered(grad);
  const OptionalTensor factors = contiguous(std);
  run(kernels().filter_norm_backward,
      {sizes_of(g), dtype_of(x), ordered_grad.const_data_ptr(), ordered.const_data_ptr(),
       data_of(factors), scale, eps, need_x ? grads.x.mutable_data_ptr() : nullptr,
       need_std ? grads.std.mutable_data_ptr() : nullptr,
       need_mean ? grads.mean.mutable_data_ptr() : nullptr});
  return {grads.x, grads.std, grads.mean};
}

template <bool kIsValid>
Tensor ddf(const Tensor& features, const OptionalTensor& channel_filter,
           const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation,
           int64_t stride, const std::string& kernel_combine) {
  return forward_of(geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation,
                                stride, std::nullopt, kIsValid),
                    features, channel_filter, spatial_filter, combine_of(kernel_combine));
}

template <bool kIsValid>
Tensor ddf_up(const Tensor& features, const OptionalTensor& channel_filter,
              const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t scale_factor,
              int64_t dilation, const std::string& kernel_combine) {
  return forward_of(geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, 1,
                                scale_factor, kIsValid),
                    features, channel_filter, spatial_filter, combine_of(kernel_combine));
}

Tensor ddf_pack(const Tensor& features, const Tensor& raw_channel, const Tensor& raw_spatial,
                const OptionalTensor& channel_std, double channel_scale, double spatial_scale,
                double eps, const OptionalTensor& bias, bool relu, int64_t kernel_size,
                int64_t dilation, int64_t stride, const std::string& kernel_combine) {
  const Geometry g = pack_geometry_of(features, raw_channel, raw_spatial, channel_std, bias,
                                      kernel_size, dilation, stride);
  const OptionalTensor std = contiguous(channel_std), offsets = contiguous(bias);
  return forward_of(
      g, features, raw_channel, raw_spatial, combine_of(kernel_combine),
      {true, channel_scale, spatial_scale, eps, data_of(std), data_of(offsets), relu});
}

Tensor ddf_softmax(const Tensor& features, const Tensor& logits, int64_t kernel_size,
                   int64_t scale_factor) {
  PackOptions options;
  options.softmax = true;
  return forward_of(geometry_of(features, std::nullopt, logits, kernel_size, 1, 1, scale_factor),
                    features, std::nullopt, logits, CombineMode::mul, options);
}

template <bool kIsValid>
std::tuple<Tensor, Tensor, Tensor> ddf_backward(
    const Tensor& grad, const Tensor& features, const OptionalTensor& channel_filter,
    const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t dilation, int64_t stride,
    const std::string& kernel_combine, bool need_features, bool need_channel, bool need_spatial) {
  return backward_of(geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation,
                                 stride, std::nullopt, kIsValid),
                     grad, features, channel_filter, spatial_filter, combine_of(kernel_combine),
                     need_features, need_channel, need_spatial);
}

template <bool kIsValid>
std::tuple<Tensor, Tensor, Tensor> ddf_up_backward(
    const Tensor& grad, const Tensor& features, const OptionalTensor& channel_filter,
    const OptionalTensor& spatial_filter, int64_t kernel_size, int64_t scale_factor,
    int64_t dilation, const std::string& kernel_combine, bool need_features, bool need_channel,
    bool need_spatial) {
  return backward_of(geometry_of(features, channel_filter, spatial_filter, kernel_size, dilation, 1,
                                 scale_factor, kIsValid),
                     grad, features, channel_filter, spatial_filter, combine_of(kernel_combine),
                     need_features, need_channel, need_spatial);
}

}  // namespace
}  // namespace ddf::cpu

STABLE_TORCH_LIBRARY_IMPL(ddf_mm, CPU, m) {
  m.impl("ddf", TORCH_BOX(&ddf::cpu::ddf<false>));
  m.impl("ddf_backward", TORCH_BOX(&ddf::cpu::ddf_backward<false>));
  m.impl("ddf_valid", TORCH_BOX(&ddf::cpu::ddf<true>));
  m.impl("ddf_valid_backward", TORCH_BOX(&ddf::cpu::ddf_backward<true>));
  m.impl("filter_norm", TORCH_BOX(&ddf::cpu::filter_norm));
  m.impl("filter_norm_backward", TORCH_BOX(&ddf::cpu::filter_norm_backward));
  m.impl("ddf_pack", TORCH_BOX(&ddf::cpu::ddf_pack));
  m.impl("ddf_softmax", TORCH_BOX(&ddf::cpu::ddf_softmax));
  m.impl("ddf_up", TORCH_BOX(&ddf::cpu::ddf_up<false>));
  m.impl("ddf_up_backward", TORCH_BOX(&ddf::cpu::ddf_up_backward<false>));
  m.impl("ddf_up_valid", TORCH_BOX(&ddf::cpu::ddf_up<true>));
  m.impl("ddf_up_valid_backward", TORCH_BOX(&ddf::cpu::ddf_up_backward<true>));
}
