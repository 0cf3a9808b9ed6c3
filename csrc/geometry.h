// Sizes of one call, shared by the CPU and CUDA kernels. No framework includes: the kernels compile
// alone.
#pragma once
#include <cstdint>

namespace ddf {

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
};

}  // namespace ddf
