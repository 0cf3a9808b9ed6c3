// Sizes of one call, shared by the CPU and CUDA kernels, and their bounds. No framework includes:
// the kernels compile alone.
#pragma once
#include <cstdint>

namespace ddf {

// Elements of a tensor, with the zeros that pad it: more than any memory holds, so that no address
// leaves the 64 bits. An expanded tensor can claim to have as many.
constexpr int64_t kMaxElements = int64_t{1} << 42;
// Terms of all sums of a call. They, and what the kernels keep of them, are counted in 64 bits.
constexpr int64_t kMaxTerms = int64_t{1} << 50;

// Whether the product of `sizes`, none of them negative, is at most `most`. Zeros count as ones:
// the product of some of the others must not overflow either.
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
  // ddf_up has an output of scale * out_height rows and scale * out_width columns, and filters for
  // each of its scale * scale subpixels.
  int64_t scale = 1;

  int64_t taps() const { return kernel * kernel; }
  int64_t subpixels() const { return scale * scale; }
  // Rows and columns of zeros before the features.
  int64_t padding() const { return dilation * (kernel / 2); }

  // Whether all that the kernels compute from the sizes fits 64 bits.
  bool is_bounded() const {
    if (!is_product_within(kMaxElements, kernel, dilation)) return false;
    // On both sides, in the output's pixels, which may be more than the features'.
    const int64_t halo = 2 * (kernel * dilation + stride);
    return is_product_within(kMaxElements, batch, channels, height, width, scale, scale) &&
           is_product_within(kMaxElements, channels, height + halo, width + halo, scale, scale) &&
           is_product_within(kMaxTerms, batch, channels, scale, scale, kernel, kernel, out_height,
                             out_width);
  }
};

}  // namespace ddf
