// The operators of ddf_mm. Kernels register into these schemas from the other files, for the CPU
// in this library, for CUDA in one of its own.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ddf_mm, m) {
  m.def(
      "ddf(Tensor features, Tensor? channel_filter, Tensor? spatial_filter, "
      "int kernel_size, int dilation, int stride, str kernel_combine) -> Tensor");
  // A gradient that is not needed, or whose filter is None, is an empty tensor.
  m.def(
      "ddf_backward(Tensor grad, Tensor features, Tensor? channel_filter, Tensor? spatial_filter, "
      "int kernel_size, int dilation, int stride, str kernel_combine, "
      "bool need_features, bool need_channel, bool need_spatial) -> (Tensor, Tensor, Tensor)");
  // ddf and its gradients without padding. For the CPU.
  m.def(
      "ddf_valid(Tensor features, Tensor? channel_filter, Tensor? spatial_filter, "
      "int kernel_size, int dilation, int stride, str kernel_combine) -> Tensor");
  m.def(
      "ddf_valid_backward(Tensor grad, Tensor features, Tensor? channel_filter, "
      "Tensor? spatial_filter, int kernel_size, int dilation, int stride, str kernel_combine, "
      "bool need_features, bool need_channel, bool need_spatial) -> (Tensor, Tensor, Tensor)");
  // x is [B, filters * taps, ...]; std and mean are [filters * taps], in the accumulation dtype.
  m.def(
      "filter_norm(Tensor x, int filters, Tensor? std, Tensor? mean, float scale, float eps) "
      "-> Tensor");
  m.def(
      "filter_norm_backward(Tensor grad, Tensor x, int filters, Tensor? std, float scale, "
      "float eps, bool need_x, bool need_std, bool need_mean) -> (Tensor, Tensor, Tensor)");
  // ddf with a prologue, FilterNorm of both filters, and an epilogue, bias [C] and ReLU. Forward
  // only.
  m.def(
      "ddf_pack(Tensor features, Tensor raw_channel, Tensor raw_spatial, Tensor? channel_std, "
      "float channel_scale, float spatial_scale, float eps, Tensor? bias, bool relu, "
      "int kernel_size, int dilation, int stride, str kernel_combine) -> Tensor");
  // Each subpixel has its own filters: channel_filter [B, s*s, C, k, k], spatial_filter
  // [B, s*s, g*k*k, H, W].
  m.def(
      "ddf_up(Tensor features, Tensor? channel_filter, Tensor? spatial_filter, "
      "int kernel_size, int scale_factor, int dilation, str kernel_combine) -> Tensor");
  m.def(
      "ddf_up_backward(Tensor grad, Tensor features, Tensor? channel_filter, "
      "Tensor? spatial_filter, int kernel_size, int scale_factor, int dilation, str "
      "kernel_combine, "
      "bool need_features, bool need_channel, bool need_spatial) -> (Tensor, Tensor, Tensor)");
  // ddf_up and its gradients without padding. For the CPU.
  m.def(
      "ddf_up_valid(Tensor features, Tensor? channel_filter, Tensor? spatial_filter, "
      "int kernel_size, int scale_factor, int dilation, str kernel_combine) -> Tensor");
  m.def(
      "ddf_up_valid_backward(Tensor grad, Tensor features, Tensor? channel_filter, "
      "Tensor? spatial_filter, int kernel_size, int scale_factor, int dilation, str "
      "kernel_combine, "
      "bool need_features, bool need_channel, bool need_spatial) -> (Tensor, Tensor, Tensor)");
  // ddf_up of the softmax of logits over the taps, with a channel filter of ones. For the CPU, and
  // forward only.
  m.def("ddf_softmax(Tensor features, Tensor logits, int kernel_size, int scale_factor) -> Tensor");
}
