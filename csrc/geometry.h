// Sizes of one call, shared by the CPU and CUDA kernels, and their bounds. No framework includes:
// the kernels compile alone.
#pragma once
#include <cstdint>

namespace ddf {

// Bound on the elements of a tensor with its zero padding: more than any memory holds, and few
// enough that addresses fit 64 bits. Expanded tensors can claim that many.
constexpr int64_t kMaxElements = int64_t{1} << 42;
// Bound on the multiply-adds of a call, so that they can be counted in 64 bits.
constexpr int64_t kMaxTerms = int64_t{1} << 50;

// Whether the product of `sizes`, all non-negative, is at most `most`. Zeros count as ones, because
// products of only some of the sizes must not overflow either.
template <typename... Sizes>
constexpr bool is_product_within(int64_t most, Sizes... sizes) {
  return ((sizes <= most && (most /= sizes > 1 ? sizes : 1) > 0) && ...);
}

struct Geometry {
  int64_t batch, channels, height, width;
  int64_t out_height, out_width;
  // Filter groups; channel c reads the spatial filter of group c / group_channels.
  int64_t groups, group_channels;
  int64_t kernel, dilation, stride;
  // ddf_up: the output has scale * out_height rows and scale * out_width columns, and each of its
  // scale * scale subpixels has its own filters.
  int64_t scale = 1;
  // Whether only pixels whose windows lie in the features are computed; for the CPU only.
  bool is_valid = false;

  int64_t taps() const { return kernel * kernel; }
  int64_t subpixels() const { return scale * scale; }
  // Rows and columns of zero padding before the features.
  int64_t padding() const { return is_valid ? 0 : dilation * (kernel / 2); }

  // Whether all that the kernels compute from the sizes fits 64 bits.
  bool is_bounded() const {
    if (!is_product_within(kMaxElements, kernel, dilation)) return false;
    // Of both sides, in output pixels; the output may be larger than the features.
    const int64_t halo = 2 * (kernel * dilation + stride);
    return is_product_within(kMaxElements, batch, channels, height, width, scale, scale) &&
           is_product_within(kMaxElements, channels, height + halo, width + halo, scale, scale) &&
           is_product_within(kMaxTerms, batch, channels, scale, scale, kernel, kernel, out_height,
                             out_width);
  }
};

}  // namespace ddf
