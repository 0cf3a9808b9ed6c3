// What the operators of every device check of their tensors, and how they make their outputs.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "geometry.h"

namespace ddf {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Stored with the channels innermost, and not also contiguous (as one pixel or one channel is).
inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  const int64_t channels = t.size(1), height = t.size(2), width = t.size(3);
  const int64_t expected[4] = {height * width * channels, 1, width * channels, channels};
  for (int i = 0; i < 4; ++i)
    if (t.size(i) != 1 && t.stride(i) != expected[i]) return false;
  return true;
}

inline Tensor empty(const Tensor& like, const std::vector<int64_t>& size, bool channels_last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

inline void check(const Tensor& tensor, const Tensor& features, const char* name,
                  int64_t dimensions = 4) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, "ddf: ", name, " must have ", dimensions,
                  " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == features.scalar_type(), "ddf: ", name,
                  " must have the dtype of features");
  STD_TORCH_CHECK(tensor.device() == features.device(), "ddf: ", name,
                  " must be on the device of features");
}

inline void check_size(const Tensor& tensor, const std::vector<int64_t>& size, const char* name) {
  for (size_t i = 0; i < size.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == size[i], "ddf: ", name, " must have size ", size[i],
                    " in dimension ", i, ", got ", tensor.size(i));
}

// ddf_mm.ops.ddf has told users of bad arguments in its own words; these checks keep a direct call
// of the operator from reading out of bounds.
inline Geometry geometry_of(const Tensor& features, const OptionalTensor& channel_filter,
                            const OptionalTensor& spatial_filter, int64_t kernel_size,
                            int64_t dilation, int64_t stride) {
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
  // More dilation puts all taps but the centre outside of the features just as well, more stride
  // all windows but the first; what the kernels compute from both stays small.
  g.dilation = std::min(dilation, std::max(g.height, g.width));
  g.stride = std::min(stride, std::max(g.height, g.width));
  return g;
}

struct NormShape {
  int64_t batch, taps, pixels;
};

// x is [B, filters * taps, ...]; what follows are pixels.
inline NormShape norm_shape_of(const Tensor& x, int64_t filters) {
  STD_TORCH_CHECK(x.dim() >= 2, "filter_norm: x must have at least 2 dimensions, got ", x.dim());
  STD_TORCH_CHECK(filters >= 1 && x.size(1) % filters == 0 && x.size(1) / filters >= 2,
                  "filter_norm: x must have a multiple of filters, at least 2 taps each, got ",
                  x.size(1), " channels for ", filters, " filters");
  NormShape shape{x.size(0), x.size(1) / filters, 1};
  for (int i = 2; i < x.dim(); ++i) shape.pixels *= x.size(i);
  return shape;
}

// The type that sums, and the parameters of filter_norm, are kept in.
inline torch::headeronly::ScalarType sum_type_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_parameter(const OptionalTensor& parameter, const Tensor& x, int64_t size,
                            const char* name) {
  if (!parameter) return;
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == size, "filter_norm: ", name,
                  " must have one dimension of ", size);
  STD_TORCH_CHECK(parameter->scalar_type() == sum_type_of(x), "filter_norm: ", name,
                  " must be float64 for x in float64, float32 otherwise");
  STD_TORCH_CHECK(parameter->device() == x.device(), "filter_norm: ", name,
                  " must be on the device of x");
}

inline void check_norm_grad(const Tensor& grad, const Tensor& x) {
  bool fits =
      grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type() && grad.device() == x.device();
  for (int i = 0; fits && i < x.dim(); ++i) fits = grad.size(i) == x.size(i);
  STD_TORCH_CHECK(fits, "filter_norm: grad must have the shape, dtype and device of x");
}

inline Tensor empty_like(const Tensor& x, bool channels_last) {
  std::vector<int64_t> size;
  for (int i = 0; i < x.dim(); ++i) size.push_back(x.size(i));
  return empty(x, size, channels_last);
}

// Room for the gradient of a parameter of filter_norm, which is empty if it is not needed.
inline Tensor empty_parameter(const Tensor& x, bool is_needed) {
  return torch::stable::empty({is_needed ? x.size(1) : 0}, sum_type_of(x), std::nullopt,
                              x.device());
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}

inline const void* data_of(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// Also checks the parameters that ddf_pack has beside ddf's.
inline Geometry pack_geometry_of(const Tensor& features, const Tensor& raw_channel,
                                 const Tensor& raw_spatial, const OptionalTensor& channel_std,
                                 const OptionalTensor& bias, int64_t kernel_size, int64_t dilation,
                                 int64_t stride) {
  const Geometry g = geometry_of(features, raw_channel, raw_spatial, kernel_size, dilation, stride);
  STD_TORCH_CHECK(kernel_size >= 3, "ddf_pack: kernel_size must be at least 3, got ", kernel_size);
  check_parameter(channel_std, features, g.channels * g.taps(), "channel_std");
  check_parameter(bias, features, g.channels, "bias");
  return g;
}

// The same as geometry_of for ddf_up, whose filters have a dimension of subpixels behind the batch.
inline Geometry up_geometry_of(const Tensor& features, const OptionalTensor& channel_filter,
                               const OptionalTensor& spatial_filter, int64_t kernel_size,
                               int64_t scale_factor, int64_t dilation) {
  // More would overflow the number of subpixels.
  constexpr int64_t kMaxScale = int64_t{1} << 30;
  STD_TORCH_CHECK(scale_factor >= 1 && scale_factor <= kMaxScale,
                  "ddf_up: scale_factor must be at least 1, got ", scale_factor);
  const int64_t subpixels = scale_factor * scale_factor;
  const auto first = [&](const OptionalTensor& filter, const char* name) {
    if (!filter) return filter;
    check(*filter, features, name, 5);
    STD_TORCH_CHECK(filter->size(1) == subpixels, "ddf_up: ", name, " must have ", subpixels,
                    " subpixels, got ", filter->size(1));
    return OptionalTensor(torch::stable::select(*filter, 1, 0));
  };
  Geometry g = geometry_of(features, first(channel_filter, "channel_filter"),
                           first(spatial_filter, "spatial_filter"), kernel_size, dilation, 1);
  g.scale = scale_factor;
  return g;
}

}  // namespace ddf
