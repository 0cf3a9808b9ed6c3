// All CPU kernels for the instruction set DDF_ISA, whose vectors have DDF_VECTOR_BYTES; included
// once by each kernels_*.cpp.
#pragma once
#include "cpu/channels_last.h"
#include "cpu/filter_norm.h"
#include "cpu/nchw.h"
#include "cpu/transposed.h"

namespace ddf::cpu {
namespace DDF_ISA {
namespace {

// What the vectors of a kernel for channels_last features run along: a row, or the channels of one
// group or of all groups.
enum class Along { rows, group, groups };

// Channels of a group, in words of 4 bytes.
template <class T>
int64_t words_of(const Geometry& g) {
  return g.group_channels * static_cast<int64_t>(sizeof(Accumulate<T>)) / 4;
}

// Without masked loads, channels that do not fill a vector are copied one by one.
template <class T>
bool has_costly_ends(const Geometry& g) {
  return !kHasMaskedLoads<T> && g.group_channels % kLanes<Accumulate<T>> && words_of<T>(g) < 64;
}

// What is fastest for forward or grad_features. The limits, here and below, were measured on an
// Intel Xeon, with AVX-512 and with AVX2.
template <class T>
Along fastest_to_filter(const Geometry& g, const SpatialStrides& strides, bool is_forward) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const int64_t words = words_of<T>(g);
  const bool is_strided = g.stride > 1;
  const int64_t separate = g.groups * ceil_div(g.group_channels, L);
  const int64_t spanning = ceil_div(g.channels, L);
  // Only separate vectors have a kernel for 3x3 windows in particular.
  const bool is_3x3 = g.kernel == 3 && g.dilation == 1 && g.scale == 1 && !is_strided;
  // Taps of a pixel that are not adjacent are read from planes, if they are few.
  const bool is_adjacent = strides.tap == 1;
  // The taps of all groups of a strip's pixels no longer fit in the L1 cache.
  const bool has_too_many_taps = g.kernel > (g.group_channels <= 3 ? 9 : 11);
  const bool spans =
      can_span_groups<A>(g) && !has_too_many_taps && (is_adjacent || g.kernel <= 3) &&
      (4 * g.channels >= 3 * L || (is_adjacent && g.kernel > 1 && kHasMaskedLoads<T>)) &&
      (g.kernel == 1 ? words < 12
       : is_3x3
           ? 2 * g.group_channels <= L || (L == 16 && g.group_channels < L && spanning < separate)
           : spanning < separate);
  if (!spans && has_costly_ends<T>(g)) return Along::rows;
  const Along along_channels = spans ? Along::groups : Along::group;
  if (g.kernel == 1) return words < 12 && !spans ? Along::rows : along_channels;
  // Percentage of the lanes that have channels, from which on vectors along channels are fastest,
  // for kernel sizes 3, 5, 7 and larger; never above 100. A strip costs as much as four lanes.
  constexpr int kFilled[2][2][2][4] = {
      // Of one group: grad_features, forward, and each with a stride.
      {{{28, 68, 86, 101}, {35, 45, 50, 62}}, {{45, 81, 88, 101}, {45, 56, 67, 79}}},
      // Of all groups.
      {{{L == 16 ? 16 : 0, 45, 45, 70}, {20, 20, 20, 30}},
       {{L == 16 ? 45 : 68, 60, 82, 101}, {25, 50, 50, 60}}}};
  const int64_t size = std::clamp<int64_t>((g.kernel - 3) / 2, 0, 3);
  const int64_t filled = 100 * g.channels / (L * (spans ? spanning : separate) + 4);
  const int wide = g.kernel <= 5 && L == 16      ? 23
                   : g.kernel <= 5 || is_strided ? 40
                   : g.kernel == 7               ? 64
                                                 : 256;
  int64_t least = kFilled[spans][is_forward][is_strided][size];
  // Transposing large spatial filters takes longer (on an AMD EPYC).
  if (L == 16 && spans && is_forward && !is_strided && g.kernel == 5 && !fits_in_caches<T>(g))
    least = 40;
  return words >= wide || filled >= least ? along_channels : Along::rows;
}

// The same for the gradients of the filters.
template <class T>
Along fastest_for_filters(const Backward& b) {
  using A = Accumulate<T>;
  const Geometry& g = b.geometry;
  const int64_t words = words_of<T>(g), k = g.kernel;
  const bool is_strided = g.stride > 1, is_dense = g.dilation == 1 && g.scale == 1;
  if (has_costly_ends<T>(g)) return Along::rows;
  if (k == 1) return Along::group;
  const bool is_whole = g.group_channels % kLanes<A> == 0;
  const int wide = k == 3 && is_strided     ? 10
                   : k == 3 && !is_dense    ? 24
                   : k == 3                 ? (is_whole ? 32 : 40)
                   : is_strided || is_whole ? 40
                                            : 64;
  if (words >= wide) return Along::group;
  const bool are_many = g.channels >= 28;
  const bool is_bundled = DDF_VECTOR_BYTES < 64  ? k == 3 && is_strided
                          : k == 3 || is_strided ? are_many || g.group_channels <= 4 + is_strided
                                                 : are_many && g.group_channels <= 3;
  const bool has_few_taps = k <= (g.group_channels > 1 ? 7 : 5);
  return is_bundled && has_few_taps && can_bundle_groups<A>(b) ? Along::groups : Along::rows;
}

enum class Pass { forward, grad_features, backward };

// Whether tiles of NCHW features are transposed for the kernels along channels. They are if a group
// has many channels, where a row fills few lanes or its pixels are not adjacent, and where both
// gradients share the transposed tiles. Measured on an AMD EPYC (Zen 5), with AVX-512 and AVX2.
template <class T>
bool is_fastest_transposed(const Geometry& g, Pass pass) {
  constexpr int L = kLanes<Accumulate<T>>;
  constexpr bool kWide = L == 16;
  const bool has_phases = g.stride > 1 || g.scale > 1;
  if (g.kernel == 1 || g.group_channels < 16 ||
      10 * g.group_channels < 7 * round_up(g.group_channels, L))
    return false;
  // The longest rows of adjacent pixels for groups of at least 16, 32 and 64 channels.
  constexpr int kLongest[2][3][3] = {
      // Forward and grad_features of 3x3 windows, of other windows, backward.
      {{10, 10, 10}, {0, 0, 0}, {0, kWide ? 20 : 10, kWide ? 28 : 14}},
      // With a stride or subpixels: forward, grad_features, backward.
      {{7, 10, kWide ? 28 : 20}, {5, 10, 10}, {kWide ? 7 : 5, kWide ? 20 : 10, kWide ? 28 : 20}}};
  int row = 2;
  if (pass != Pass::backward) {
    if (!kWide && g.scale > 1 && g.kernel > 3) return false;
    row = has_phases ? pass == Pass::grad_features : !is_3x3(g, pass == Pass::forward);
  }
  // Longer rows too if their last vector has empty lanes.
  if (kWide && sizeof(T) == 4 && pass == Pass::backward && !has_phases && g.kernel == 3 &&
      g.group_channels >= 64 && g.out_width <= 64 &&
      17 * g.out_width <= 16 * round_up(g.out_width, L))
    return true;
  const int size = g.group_channels >= 64 ? 2 : g.group_channels >= 32 ? 1 : 0;
  int64_t longest = kLongest[has_phases][row][size];
  if (g.kernel > 7) longest = std::min<int64_t>(longest, 7);
  return (pass == Pass::grad_features ? ceil_div(g.width, g.stride) : g.out_width) <= longest;
}

// Only these have kernels that transpose.
template <class T>
constexpr bool kCanTranspose = DDF_VECTOR_BYTES >= 32 && sizeof(Accumulate<T>) == 4;

// The kernels for NCHW rows that fill at most half a vector of AVX-512, those of AVX2; otherwise
// null.
template <class T>
const Kernels* kernels_of_short_rows([[maybe_unused]] const Geometry& g,
                                     [[maybe_unused]] bool channels_last) {
#if DDF_VECTOR_BYTES == 64
  if (!channels_last && 2 * g.out_width <= kLanes<Accumulate<T>>) return &avx2_kernels;
#endif
  return nullptr;
}

template <class T, class Combine>
void forward_as(const Forward& f, ParallelFor run) {
  if constexpr (kCanTranspose<T>)
    if (!f.channels_last && !f.pack.softmax && is_fastest_transposed<T>(f.geometry, Pass::forward))
      return filter_transposed<T, Combine>(Filtering<T>(f), run);
  const Along along = fastest_to_filter<T>(f.geometry, f.spatial_strides, true);
  // Only the kernels along rows have a softmax.
  if (f.channels_last && !f.pack.softmax && along != Along::rows)
    filter_channels_last<T, Combine>(Filtering<T>(f), along == Along::groups, run);
  else if (const Kernels* smaller = kernels_of_short_rows<T>(f.geometry, f.channels_last))
    smaller->forward(f, run);
  else
    forward_nchw<T, Combine>(f, run);
}

template <class T, class Combine>
void grad_features_as(const Backward& b, ParallelFor run) {
  if constexpr (kCanTranspose<T>)
    if (!b.channels_last && is_fastest_transposed<T>(b.geometry, Pass::grad_features))
      return filter_transposed<T, Combine>(Filtering<T>(b), run);
  const Along along = fastest_to_filter<T>(b.geometry, b.spatial_strides, false);
  if (b.channels_last && along != Along::rows)
    filter_channels_last<T, Combine>(Filtering<T>(b), along == Along::groups, run);
  else if (const Kernels* smaller = kernels_of_short_rows<T>(b.geometry, b.channels_last))
    smaller->backward(b, run);
  else
    grad_features_nchw<T, Combine>(b, run);
}

template <class T, class Combine>
void grad_filters_as(const Backward& b, ParallelFor run) {
  const Along along = fastest_for_filters<T>(b);
  // Kernels along rows are nearly as fast for 16-bit types.
  if constexpr (sizeof(T) >= 4)
    if (b.channels_last && along == Along::groups)
      return grad_filters_few_channels<T, Combine>(b, run);
  if (b.channels_last && along == Along::group)
    grad_filters_channels_last<T, Combine>(b, run);
  else if (const Kernels* smaller = kernels_of_short_rows<T>(b.geometry, b.channels_last))
    smaller->backward(b, run);
  else
    grad_filters_nchw<T, Combine>(b, run);
}

template <class T, class Combine>
void backward_as(const Backward& b, ParallelFor run) {
  const bool needs_filters = b.grad_channel || b.grad_spatial;
  if constexpr (kCanTranspose<T>)
    if (!b.channels_last && needs_filters && is_fastest_transposed<T>(b.geometry, Pass::backward))
      return backward_transposed<T, Combine>(b, run);
  Backward features = b, filters = b;
  features.grad_channel = features.grad_spatial = nullptr;
  filters.grad_features = nullptr;
  if (b.grad_features) grad_features_as<T, Combine>(features, run);
  if (needs_filters) grad_filters_as<T, Combine>(filters, run);
}

// Calls with(T()) for the elements' type.
template <class F>
void with_type(DType dtype, const F& with) {
  switch (dtype) {
    case DType::f32:
      return with(float());
    case DType::f64:
      return with(double());
    case DType::f16:
      return with(Half());
    case DType::bf16:
      return with(BFloat16());
  }
}

void forward(const Forward& f, ParallelFor run) {
  with_type(f.dtype, [&](auto element) {
    using T = decltype(element);
    with_combine(f.combine, [&](auto combine) { forward_as<T, decltype(combine)>(f, run); });
  });
}
void backward(const Backward& b, ParallelFor run) {
  with_type(b.dtype, [&](auto element) {
    using T = decltype(element);
    with_combine(b.combine, [&](auto combine) { backward_as<T, decltype(combine)>(b, run); });
  });
}
void filter_norm(const FilterNorm& n, ParallelFor run) {
  with_type(n.dtype, [&](auto element) { filter_norm<decltype(element)>(n, run); });
}
void filter_norm_backward(const FilterNormBackward& n, ParallelFor run) {
  with_type(n.dtype, [&](auto element) {
    using T = decltype(element);
    if (n.grad_x) filter_norm_grad_x<T>(n, run);
    if (n.grad_std || n.grad_mean) filter_norm_grad_parameters<T>(n, run);
  });
}

}  // namespace
}  // namespace DDF_ISA

#define DDF_JOIN_(a, b) a##b
#define DDF_JOIN(a, b) DDF_JOIN_(a, b)
extern const Kernels DDF_JOIN(DDF_ISA, _kernels) = {
    DDF_ISA::forward, DDF_ISA::backward, DDF_ISA::filter_norm, DDF_ISA::filter_norm_backward};

}  // namespace ddf::cpu
