// FilterNorm: subtracts the mean of each filter, divides by its standard deviation, scales and
// shifts. In filter_norm a thread has one filter, whose taps it reads repeatedly, from the L1
// cache; the kernels of ddf_pack normalize filters in registers or shared memory.
#pragma once
#include <cmath>

#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kFilterNormThreads = 256;

// Filters [batch][filters][taps][pixels], or with taps_inner [batch][pixels][filters][taps].
template <typename T>
struct FilterNormArguments {
  int64_t batch, filters, taps, pixels;
  bool taps_inner;
  const T* grad;  // of the result; null in the forward pass
  const T* x;
  // [filters * taps]; null if absent.
  const Accumulate<T>* std;
  const Accumulate<T>* mean;
  Accumulate<T> scale, eps;
  T* result;  // or the gradient of x
  // Null where a gradient is not needed.
  Accumulate<T>* grad_std;
  Accumulate<T>* grad_mean;

  DDF_DEVICE int64_t tap_stride() const { return taps_inner ? 1 : pixels; }
  // The first tap of filter `filter` at pixel `pixel` of an image.
  DDF_DEVICE int64_t offset(int64_t image, int64_t filter, int64_t pixel) const {
    return taps_inner ? ((image * pixels + pixel) * filters + filter) * taps
                      : (image * filters + filter) * taps * pixels + pixel;
  }
};

DDF_DEVICE float square_root(float value) { return sqrtf(value); }
DDF_DEVICE double square_root(double value) { return sqrt(value); }

// Standardizes the taps of a filter: (x - first - mean) * inverse. Subtracting the first tap makes
// equal taps exactly 0, however their mean is rounded; inverse and slope of such a filter are 0.
template <typename A>
struct Moments {
  A first, mean, inverse, slope;

  DDF_DEVICE A standardized(A x) const { return (x - first - mean) * inverse; }
};

// tap_at(i) is tap i of the filter.
template <typename A, typename TapAt>
DDF_DEVICE Moments<A> moments_of(const TapAt& tap_at, int taps, A eps) {
  Moments<A> m{tap_at(0), 0, 0, 0};
  for (int tap = 1; tap < taps; ++tap) m.mean += tap_at(tap) - m.first;
  m.mean /= taps;
  A squares = 0;
  for (int tap = 0; tap < taps; ++tap) {
    const A difference = tap_at(tap) - m.first - m.mean;
    squares += difference * difference;
  }
  const A variance = squares / (taps - 1);
  if (variance != 0) {
    const A deviation = square_root(variance);
    m.inverse = 1 / (deviation + eps);
    m.slope = 1 / (deviation * (taps - 1));
  }
  return m;
}

template <typename T>
DDF_DEVICE Moments<Accumulate<T>> moments_of(const T* x, int taps, int64_t stride,
                                             Accumulate<T> eps) {
  return moments_of([&](int tap) { return load(x + tap * stride); }, taps, eps);
}

// FilterNorm of one filter in place, values[tap * step]; `std` has a factor for each tap, or is
// null.
template <int Taps, typename Values, typename A>
DDF_DEVICE void normalize(Values values, int step, A scale, A eps, const A* std = nullptr) {
  const auto m = moments_of([&](int tap) -> A { return values[tap * step]; }, Taps, eps);
  for (int tap = 0; tap < Taps; ++tap) {
    A value = m.standardized(values[tap * step]) * scale;
    if (std != nullptr) value *= load(std + tap);
    values[tap * step] = value;
  }
}

// The same with the parameters of ddf_pack.
template <int Taps, typename A>
DDF_DEVICE void normalize_spatial(const PackOptions<A>& pack, A* values, int step) {
  normalize<Taps>(values, step, pack.spatial_scale, pack.eps);
}

template <int Taps, typename A, typename Values>
DDF_DEVICE void normalize_channel(const PackOptions<A>& pack, int64_t channel, Values values,
                                  int step) {
  const A* const std = pack.channel_std;
  normalize<Taps>(values, step, pack.channel_scale, pack.eps,
                  std == nullptr ? nullptr : std + channel * Taps);
}

struct FilterPosition {
  int64_t image, filter, pixel;
  bool inside;
};

template <typename T>
DDF_DEVICE FilterPosition filter_of_thread(const FilterNormArguments<T>& a) {
  const int64_t index = block_index() * kFilterNormThreads + thread_index();
  // Neighbouring threads access neighbouring addresses.
  const int64_t inner = a.taps_inner ? a.filters : a.pixels;
  const int64_t outer = a.taps_inner ? a.pixels : a.filters;
  const int64_t first = index % inner, second = index / inner % outer;
  const int64_t image = index / inner / outer;
  return {image, a.taps_inner ? first : second, a.taps_inner ? second : first, image < a.batch};
}

template <typename T>
DDF_KERNEL(kFilterNormThreads)
filter_norm_forward(FilterNormArguments<T> a) {
  const FilterPosition at = filter_of_thread(a);
  if (!at.inside) return;
  const int64_t offset = a.offset(at.image, at.filter, at.pixel), stride = a.tap_stride();
  const int taps = a.taps;
  const auto m = moments_of(a.x + offset, taps, stride, a.eps);
  for (int tap = 0; tap < taps; ++tap) {
    keep_branches();
    const int64_t parameter = at.filter * taps + tap;
    Accumulate<T> value = m.standardized(load(a.x + offset + tap * stride)) * a.scale;
    if (a.std != nullptr) value *= load(a.std + parameter);
    if (a.mean != nullptr) value += load(a.mean + parameter);
    store(a.result + offset + tap * stride, value);
  }
}

template <typename T>
DDF_KERNEL(kFilterNormThreads)
filter_norm_grad_x(FilterNormArguments<T> a) {
  using A = Accumulate<T>;
  const FilterPosition at = filter_of_thread(a);
  if (!at.inside) return;
  const int64_t offset = a.offset(at.image, at.filter, at.pixel), stride = a.tap_stride();
  const int taps = a.taps;
  const auto m = moments_of(a.x + offset, taps, stride, a.eps);
  const auto grad_at = [&](int tap) {
    const A grad = load(a.grad + offset + tap * stride) * a.scale;
    return a.std != nullptr ? grad * load(a.std + at.filter * taps + tap) : grad;
  };
  A sum = 0, product = 0;
  for (int tap = 0; tap < taps; ++tap) {
    const A grad = grad_at(tap);
    sum += grad;
    product += grad * m.standardized(load(a.x + offset + tap * stride));
  }
  const A mean = sum / taps, slope = product * m.slope;
  for (int tap = 0; tap < taps; ++tap) {
    store(a.result + offset + tap * stride,
          (grad_at(tap) - mean) * m.inverse -
              m.standardized(load(a.x + offset + tap * stride)) * slope);
  }
}

// A block sums over images and pixels for one tap of one filter.
template <typename T>
DDF_KERNEL(kFilterNormThreads)
filter_norm_grad_parameters(FilterNormArguments<T> a) {
  using A = Accumulate<T>;
  DDF_SHARED(A, sums);
  auto* const sums_alone = sums + kFilterNormThreads;
  const int64_t filter = block_index() / a.taps, stride = a.tap_stride();
  const int taps = a.taps, tap = block_index() % taps;
  A with_x = 0, alone = 0;
  for (int64_t i = thread_index(); i < a.batch * a.pixels; i += kFilterNormThreads) {
    const int64_t offset = a.offset(i / a.pixels, filter, i % a.pixels);
    keep_branches();
    const A grad = load(a.grad + offset + tap * stride);
    alone += grad;
    if (a.grad_std != nullptr) {
      const auto m = moments_of(a.x + offset, taps, stride, a.eps);
      with_x += grad * m.standardized(load(a.x + offset + tap * stride));
    }
  }
  sums[thread_index()] = with_x;
  sums_alone[thread_index()] = alone;
  for (int half = kFilterNormThreads / 2; half >= 1; half /= 2) {
    sync_threads();
    if (thread_index() < half) {
      sums[thread_index()] += sums[thread_index() + half];
      sums_alone[thread_index()] += sums_alone[thread_index() + half];
    }
  }
  if (thread_index() == 0) {
    if (a.grad_std != nullptr) store(a.grad_std + block_index(), sums[0] * a.scale);
    if (a.grad_mean != nullptr) store(a.grad_mean + block_index(), sums_alone[0]);
  }
}

template <typename T>
int64_t filter_norm_blocks(const FilterNormArguments<T>& a) {
  return (a.batch * a.filters * a.pixels - 1) / kFilterNormThreads + 1;
}

template <typename T, typename Launch>
void launch_filter_norm(const FilterNormArguments<T>& a, Launch&& launch) {
  launch("filter_norm", DDF_HANDLE(filter_norm_forward<T>), filter_norm_blocks(a),
         kFilterNormThreads, size_t{0}, a);
}

// Computes the gradients that are needed.
template <typename T, typename Launch>
void launch_filter_norm_backward(const FilterNormArguments<T>& a, Launch&& launch) {
  if (a.result != nullptr) {
    launch("filter_norm grad_x", DDF_HANDLE(filter_norm_grad_x<T>), filter_norm_blocks(a),
           kFilterNormThreads, size_t{0}, a);
  }
  if (a.grad_std != nullptr || a.grad_mean != nullptr) {
    launch("filter_norm grad_parameters", DDF_HANDLE(filter_norm_grad_parameters<T>),
           a.filters * a.taps, kFilterNormThreads, 2 * sizeof(Accumulate<T>) * kFilterNormThreads,
           a);
  }
}

}  // namespace ddf::cuda
