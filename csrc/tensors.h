// Argument checks of the operators of every device, for memory safety only. ddf_mm.ops validates
// its arguments in Python, but programs can call the operators directly, and exported programs call
// them with sizes that Python never saw.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "combine.h"
#include "geometry.h"
#include "memory.h"

namespace ddf {

// Whether t is channels_last, or a slice of such a tensor, and not also contiguous, as a tensor of
// one pixel or one channel is.
inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous() || t.size(1) == 1) return false;
  int64_t least = 1;
  for (const int i : {1, 3, 2, 0}) {
    if (t.size(i) == 1) continue;
    if (i == 1 ? t.stride(i) != 1 : t.stride(i) < least) return false;
    least = t.stride(i) * t.size(i);
  }
  return true;
}

inline std::vector<int64_t> size_of(const Tensor& t) {
  std::vector<int64_t> size;
  for (int64_t i = 0; i < t.dim(); ++i) size.push_back(t.size(i));
  return size;
}

// Python's None arrives as an undefined tensor.
inline void check_defined(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.defined(), "ddf_mm: ", name, " must be a tensor, got None");
}

inline void check_dtype(const Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16 ||
                      type == ScalarType::Float || type == ScalarType::Double,
                  "ddf_mm: ", name, " must be float16, bfloat16, float32 or float64, got ",
                  torch::headeronly::toString(type));
}

// `like` is the argument of the name `of`.
inline void check_kind(const Tensor& tensor, const Tensor& like, const char* name,
                       int64_t dimensions, const char* of = "features") {
  check_defined(tensor, name);
  STD_TORCH_CHECK(tensor.dim() == dimensions, "ddf_mm: ", name, " must have ", dimensions,
                  " dimensions, got ", tensor.dim());
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), "ddf_mm: ", name,
                  " must have the dtype of ", of);
  STD_TORCH_CHECK(tensor.device() == like.device(), "ddf_mm: ", name, " must be on the device of ",
                  of);
}

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name,
                       const std::vector<int64_t>& size, const char* of = "features") {
  check_kind(tensor, like, name, static_cast<int64_t>(size.size()), of);
  for (size_t i = 0; i < size.size(); ++i)
    STD_TORCH_CHECK(tensor.size(i) == size[i], "ddf_mm: ", name, " must have size ", size[i],
                    " in dimension ", i, ", got ", tensor.size(i));
}

inline void check_like(const OptionalTensor& tensor, const Tensor& like, const char* name,
                       const std::vector<int64_t>& size) {
  if (tensor) check_like(*tensor, like, name, size);
}

inline void check_elements(bool is_bounded) {
  STD_TORCH_CHECK(is_bounded,
                  "ddf_mm: the tensors, or the work on them, are larger than any memory");
}

inline void check_features(const Tensor& features) {
  check_defined(features, "features");
  STD_TORCH_CHECK(features.dim() == 4, "ddf_mm: features must have 4 dimensions, got ",
                  features.dim());
  check_dtype(features, "features");
  for (int i = 1; i < 4; ++i)
    STD_TORCH_CHECK(features.size(i) >= 1,
                    "ddf_mm: features must have at least one channel, row and column");
}

inline CombineMode combine_of(const std::string& kernel_combine) {
  std::string names;
  int mode = 0;
  for (const std::string name : kCombineNames) {
    if (name == kernel_combine) return static_cast<CombineMode>(mode);
    names += (mode++ ? " or '" : "'") + name + "'";
  }
  STD_TORCH_CHECK(false, "ddf_mm: kernel_combine must be ", names, ", got '", kernel_combine, "'");
}

inline int64_t ceil_of_quotient(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

// With `scale` (ddf_up), filters have a dimension of subpixels after the batch. `is_valid`: without
// padding.
inline Geometry geometry_of(const Tensor& features, const OptionalTensor& channel_filter,
                            const OptionalTensor& spatial_filter, int64_t kernel_size,
                            int64_t dilation, int64_t stride,
                            std::optional<int64_t> scale = std::nullopt, bool is_valid = false) {
  STD_TORCH_CHECK(kernel_size >= 1 && kernel_size % 2 == 1, "ddf_mm: kernel_size must be odd, got ",
                  kernel_size);
  check_elements(is_product_within(kMaxTerms, kernel_size, kernel_size));
  STD_TORCH_CHECK(dilation >= 1 && stride >= 1,
                  "ddf_mm: dilation and stride must be at least 1, got ", dilation, " and ",
                  stride);
  STD_TORCH_CHECK(channel_filter || spatial_filter,
                  "ddf_mm: channel_filter and spatial_filter are both None");
  Geometry g;
  g.scale = scale.value_or(1);
  STD_TORCH_CHECK(g.scale >= 1, "ddf_mm: scale_factor must be at least 1, got ", g.scale);
  check_elements(is_product_within(kMaxTerms, g.scale, g.scale));
  check_features(features);
  g.batch = features.size(0);
  g.channels = features.size(1);
  g.height = features.size(2);
  g.width = features.size(3);
  g.kernel = kernel_size;
  g.is_valid = is_valid;
  int64_t extent = 0;
  if (is_valid) {
    const int64_t least = std::min(g.height, g.width);
    STD_TORCH_CHECK(kernel_size == 1 || is_product_within(least - 1, kernel_size - 1, dilation),
                    "ddf_mm: features must have more than dilation * (kernel_size - 1) rows and "
                    "columns without padding, got ",
                    least);
    extent = (kernel_size - 1) * dilation;
  }
  g.out_height = ceil_of_quotient(g.height - extent, stride);
  g.out_width = ceil_of_quotient(g.width - extent, stride);
  g.groups = 1;
  // [B, ...], or [B, subpixels, ...].
  const auto of_filter = [&](const std::vector<int64_t>& size) {
    std::vector<int64_t> whole = {g.batch};
    if (scale) whole.push_back(g.subpixels());
    whole.insert(whole.end(), size.begin(), size.end());
    return whole;
  };
  check_like(channel_filter, features, "channel_filter",
             of_filter({g.channels, kernel_size, kernel_size}));
  if (spatial_filter) {
    check_kind(*spatial_filter, features, "spatial_filter", scale ? 5 : 4);
    const int64_t last = spatial_filter->dim() - 1;
    const int64_t spatial_channels = spatial_filter->size(last - 2);
    const int64_t rows = spatial_filter->size(last - 1), columns = spatial_filter->size(last);
    STD_TORCH_CHECK(rows >= 1 && (rows == g.out_height || (!is_valid && rows == g.height / stride)),
                    "ddf_mm: spatial_filter has ", rows, " rows for ", g.height, " of features");
    STD_TORCH_CHECK(
        columns >= 1 && (columns == g.out_width || (!is_valid && columns == g.width / stride)),
        "ddf_mm: spatial_filter has ", columns, " columns for ", g.width, " of features");
    g.out_height = rows;
    g.out_width = columns;
    g.groups = spatial_channels / g.taps();
    STD_TORCH_CHECK(g.groups >= 1 && spatial_channels % g.taps() == 0 && g.channels % g.groups == 0,
                    "ddf_mm: spatial_filter has ", spatial_channels, " channels for ", g.channels,
                    " of features and kernel_size ", kernel_size);
    check_like(*spatial_filter, features, "spatial_filter",
               of_filter({spatial_channels, rows, columns}));
  }
  g.group_channels = g.channels / g.groups;
  // A larger dilation changes nothing, since all taps but the centre lie outside the features, nor
  // does a larger stride, since there is one output. The bounds keep computed offsets small.
  g.dilation = std::min(dilation, std::max(g.height, g.width));
  g.stride = std::min(stride, std::max(g.height, g.width));
  check_elements(g.is_bounded());
  return g;
}

inline std::vector<int64_t> output_size(const Geometry& g) {
  return {g.batch, g.channels, g.scale * g.out_height, g.scale * g.out_width};
}

// The accumulation type, which is also that of filter_norm's parameters.
inline torch::headeronly::ScalarType accumulate_type_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_parameter(const OptionalTensor& parameter, const Tensor& like, int64_t size,
                            const char* name, const char* of) {
  if (!parameter) return;
  STD_TORCH_CHECK(parameter->dim() == 1 && parameter->size(0) == size, "ddf_mm: ", name,
                  " must have one dimension of ", size);
  STD_TORCH_CHECK(parameter->scalar_type() == accumulate_type_of(like), "ddf_mm: ", name,
                  " must be float64 if ", of, " is, float32 otherwise");
  STD_TORCH_CHECK(parameter->device() == like.device(), "ddf_mm: ", name,
                  " must be on the device of ", of);
}

// As geometry_of, and checks the other arguments of ddf_pack.
inline Geometry pack_geometry_of(const Tensor& features, const Tensor& raw_channel,
                                 const Tensor& raw_spatial, const OptionalTensor& channel_std,
                                 const OptionalTensor& bias, int64_t kernel_size, int64_t dilation,
                                 int64_t stride) {
  const Geometry g = geometry_of(features, raw_channel, raw_spatial, kernel_size, dilation, stride);
  STD_TORCH_CHECK(kernel_size >= 3, "ddf_mm: kernel_size must be at least 3, got ", kernel_size);
  check_parameter(channel_std, features, g.channels * g.taps(), "channel_std", "features");
  check_parameter(bias, features, g.channels, "bias", "features");
  return g;
}

// Sizes and memory format of filter_norm's input.
struct FilterNormGeometry {
  int64_t batch, filters, taps, pixels;
  bool channels_last;

  // x is [B, filters * taps, ...]; the remaining dimensions are pixels.
  FilterNormGeometry(const Tensor& x, int64_t filters, const OptionalTensor& std)
      : filters(filters) {
    check_defined(x, "x");
    STD_TORCH_CHECK(x.dim() >= 2, "ddf_mm: x must have at least 2 dimensions, got ", x.dim());
    check_dtype(x, "x");
    STD_TORCH_CHECK(filters >= 1 && x.size(1) % filters == 0 && x.size(1) / filters >= 2,
                    "ddf_mm: x must have a multiple of filters, at least 2 taps each, got ",
                    x.size(1), " channels for ", filters, " filters");
    int64_t room = kMaxElements;
    for (const int64_t size : size_of(x)) {
      check_elements(is_product_within(room, size));
      room /= std::max<int64_t>(size, 1);
    }
    batch = x.size(0);
    taps = x.size(1) / filters;
    pixels = 1;
    for (int64_t i = 2; i < x.dim(); ++i) pixels *= x.size(i);
    channels_last = x.dim() == 4 && is_channels_last(x);
    check_parameter(std, x, x.size(1), "std", "x");
  }

  Tensor ordered(const Tensor& t) const { return in_layout(t, channels_last); }
  bool is_empty() const { return batch * pixels == 0; }
  // Whether the taps of a filter are adjacent in memory; if not, the pixels are.
  bool has_taps_inner() const { return channels_last || pixels == 1; }
};

// The gradients of filter_norm; empty where one is not needed.
struct __attribute__((visibility("hidden"))) FilterNormGradients {
  Tensor x, std, mean;

  FilterNormGradients(const FilterNormGeometry& g, const Tensor& like, bool need_x, bool need_std,
                      bool need_mean)
      : x(need_x ? empty(like, size_of(like), g.channels_last) : no_gradient(like)),
        std(empty(like, {need_std ? like.size(1) : 0}, false, accumulate_type_of(like))),
        mean(empty(like, {need_mean ? like.size(1) : 0}, false, accumulate_type_of(like))) {
    if (!g.is_empty()) return;
    torch::stable::zero_(std);
    torch::stable::zero_(mean);
  }
};

// The gradients of ddf and ddf_up; empty where one is not needed.
struct __attribute__((visibility("hidden"))) DDFGradients {
  bool need_features, need_channel, need_spatial;
  Tensor features, channel_filter, spatial_filter;

  DDFGradients(const Geometry& g, const Tensor& grad, const Tensor& of_features,
               const OptionalTensor& of_channel, const OptionalTensor& of_spatial,
               bool need_features, bool need_channel, bool need_spatial)
      : need_features(need_features),
        need_channel(need_channel && of_channel),
        need_spatial(need_spatial && of_spatial),
        features(checked_like(grad, of_features, g)),
        channel_filter(this->need_channel ? empty(of_features, size_of(*of_channel), false)
                                          : no_gradient(of_features)),
        spatial_filter(this->need_spatial
                           ? empty(of_features, size_of(*of_spatial),
                                   of_spatial->dim() == 4 && is_channels_last(*of_spatial))
                           : no_gradient(of_features)) {}

  // Whether there is nothing to compute.
  bool is_empty() const {
    return features.numel() + channel_filter.numel() + spatial_filter.numel() == 0;
  }

 private:
  Tensor checked_like(const Tensor& grad, const Tensor& of, const Geometry& g) const {
    check_like(grad, of, "grad", output_size(g));
    return need_features ? empty(of, size_of(of), is_channels_last(of)) : no_gradient(of);
  }
};

}  // namespace ddf
