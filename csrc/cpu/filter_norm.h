// FilterNorm: subtracts the mean of each filter, divides by its standard deviation, scales and
// shifts.
#pragma once
#include "cpu/simd.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// Of L filters: 1 / (deviation + eps), and the factor of the gradient through the deviation. Both
// are 0 for a filter whose taps are all equal.
template <class A, int L>
struct Moments {
  Vector<A, L> inverse, slope;
};

// Standardizes L filters in place, values[t * step + lane], and multiplies them by scale.
template <class A, int L>
DDF_INLINE Moments<A, L> standardize(A* values, int64_t taps, int64_t step, A eps, A scale = 1) {
  using V = Vector<A, L>;
  // Subtracting the first tap makes equal taps exactly 0, however their mean is rounded.
  const V first = load<L>(values);
  V sum{};
  for (int64_t t = 0; t < taps; ++t) {
    const V difference = load<L>(values + t * step) - first;
    store<L>(values + t * step, difference);
    sum += difference;
  }
  const V mean = sum / static_cast<A>(taps);
  V squares{};
  for (int64_t t = 0; t < taps; ++t) {
    const V difference = load<L>(values + t * step) - mean;
    store<L>(values + t * step, difference);
    squares += difference * difference;
  }
  const V variance = squares / static_cast<A>(taps - 1);
  V deviation{};
  for (int lane = 0; lane < L; ++lane) deviation[lane] = std::sqrt(variance[lane]);
  const auto is_constant = variance == V{};
  const V inverse = is_constant ? V{} : A(1) / (deviation + eps);
  const V slope = is_constant ? V{} : A(1) / (deviation * static_cast<A>(taps - 1));
  const V factor = inverse * scale;
  for (int64_t t = 0; t < taps; ++t)
    store<L>(values + t * step, load<L>(values + t * step) * factor);
  return {inverse, slope};
}

// Softmax of L filters in place, values[t * L + lane].
template <class A, int L>
DDF_INLINE void softmax(A* values, int64_t taps) {
  using V = Vector<A, L>;
  V largest = load<L>(values), sum{};
  for (int64_t t = 1; t < taps; ++t) {
    const V value = load<L>(values + t * L);
    largest = value > largest ? value : largest;
  }
  for (int64_t t = 0; t < taps; ++t) {
    const V value = exp_of_negative<A, L>(load<L>(values + t * L) - largest);
    store<L>(values + t * L, value);
    sum += value;
  }
  const V factor = A(1) / sum;
  for (int64_t t = 0; t < taps; ++t) store<L>(values + t * L, load<L>(values + t * L) * factor);
}

// PackOptions in the accumulation type A.
template <class A>
struct TypedPackOptions {
  bool normalize, normalize_spatial, softmax;
  A channel_scale, spatial_scale, eps;
  const A* channel_std;
  const A* bias;
  // Lower bound of the output: 0 for ReLU, otherwise -infinity.
  A output_min;

  explicit TypedPackOptions(const PackOptions& s = {})
      : normalize(s.normalize),
        normalize_spatial(s.normalize),
        softmax(s.softmax),
        channel_scale(static_cast<A>(s.channel_scale)),
        spatial_scale(static_cast<A>(s.spatial_scale)),
        eps(static_cast<A>(s.eps)),
        channel_std(static_cast<const A*>(s.channel_std)),
        bias(static_cast<const A*>(s.bias)),
        output_min(s.relu ? A(0) : -std::numeric_limits<A>::infinity()) {}

  // The options of the channels from one on.
  TypedPackOptions from_channel(int64_t channel, int64_t taps) const {
    TypedPackOptions options = *this;
    if (channel_std) options.channel_std += channel * taps;
    if (bias) options.bias += channel;
    return options;
  }

  // FilterNorm of `lanes` channels starting at `channel`, values[t * L + lane].
  template <int L>
  DDF_INLINE void normalize_channels(A* values, int64_t taps, int64_t channel,
                                     int64_t lanes) const {
    if (!normalize) return;
    standardize<A, L>(values, taps, L, eps, channel_scale);
    if (channel_std)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t lane = 0; lane < lanes; ++lane)
          values[t * L + lane] *= channel_std[(channel + lane) * taps + t];
  }
};

// NaNs are kept.
template <class V>
DDF_INLINE V clamp_min(V v, V output_min) {
  return v < output_min ? output_min : v;
}

// PixelsInner and TapsInner load L filters to values[t * L + lane] and store them, for one memory
// format each. Lanes after the last filter are zero.
//
// Pixels adjacent in memory, [batch][filters][taps][pixels]: L pixels of one filter.
template <class A>
struct PixelsInner {
  static constexpr int L = kLanes<A>;
  const FilterNormSizes& s;
  int64_t image, filter, pixel;

  int64_t count() const { return std::min<int64_t>(L, s.pixels - pixel); }
  template <class T>
  T* line(T* data, int64_t t) const {
    return data + ((image * s.filters + filter) * s.taps + t) * s.pixels + pixel;
  }
  template <class T>
  DDF_INLINE void load_all(const T* from, A* values, int64_t taps) const {
    const T* first = line(from, 0);
    const auto load_lanes = [&](auto is_whole) __attribute__((always_inline)) {
      for (int64_t t = 0; t < taps; ++t)
        store<L>(values + t * L,
                 load_first<L>(first + t * s.pixels, decltype(is_whole)::value ? L : count()));
    };
    count() == L ? load_lanes(std::true_type()) : load_lanes(std::false_type());
  }
  template <class T>
  DDF_INLINE void store_all(T* to, const A* values, int64_t taps) const {
    T* first = line(to, 0);
    const auto store_lanes = [&](auto is_whole) __attribute__((always_inline)) {
      for (int64_t t = 0; t < taps; ++t)
        store_first<L>(first + t * s.pixels, load<L>(values + t * L),
                       decltype(is_whole)::value ? L : count());
    };
    count() == L ? store_lanes(std::true_type()) : store_lanes(std::false_type());
  }
  // data is [filters * taps].
  DDF_INLINE Vector<A, L> parameter(const A* data, int64_t t) const {
    return splat<A, L>(data[filter * s.taps + t]);
  }
};

// Taps adjacent in memory, [batch][pixels][filters][taps]: `rows` <= L filters starting at `row`.
template <class A>
struct TapsInner {
  static constexpr int L = kLanes<A>;
  const FilterNormSizes& s;
  int64_t row, rows;

  template <class T>
  DDF_INLINE void load_all(const T* from, A* values, int64_t taps) const {
    const T* first = from + row * taps;
    if (rows < L) std::fill(values, values + taps * L, A(0));
    for (int64_t lane = 0; lane < rows; ++lane)
      for (int64_t t = 0; t < taps; ++t) values[t * L + lane] = widen(first[lane * taps + t]);
  }
  template <class T>
  DDF_INLINE void store_all(T* to, const A* values, int64_t taps) const {
    T* first = to + row * taps;
    for (int64_t lane = 0; lane < rows; ++lane)
      for (int64_t t = 0; t < taps; ++t) first[lane * taps + t] = narrow<T>(values[t * L + lane]);
  }
  DDF_INLINE Vector<A, L> parameter(const A* data, int64_t t) const {
    Vector<A, L> values;
    int64_t filter = row % s.filters;
    for (int lane = 0; lane < L; ++lane) {
      values[lane] = data[filter * s.taps + t];
      filter = filter + 1 == s.filters ? 0 : filter + 1;
    }
    return values;
  }
};

// Calls body(filters, taps, room) with room for kArrays times L filters. With 9 taps, their number
// is a constant and the room is on the stack, so that compilers can use registers.
template <int kArrays, class Filters, class A, class F>
DDF_INLINE void call_with_taps(int64_t taps, const Filters& filters, A* scratch, const F& body) {
  constexpr int kRoom = kArrays * 9 * kLanes<A>;
  if (taps == 9) {
    alignas(DDF_VECTOR_BYTES) A room[kRoom];
    body(filters, std::integral_constant<int64_t, 9>(), room);
  } else {
    body(filters, taps, scratch);
  }
}

// As call_with_taps, for all filters, L at a time.
template <class A, int kArrays, class F>
void for_each_filters(const FilterNormSizes& s, ParallelFor run, const F& body) {
  constexpr int L = kLanes<A>;
  if (s.taps_inner) {
    const int64_t rows = s.batch * s.pixels * s.filters, blocks = ceil_div(rows, L);
    // Threads take many neighbouring filters.
    constexpr int64_t kBlocks = 16;
    parallel(run, ceil_div(blocks, kBlocks), [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(kArrays * s.taps * L);
      for (int64_t block = begin * kBlocks; block < std::min(end * kBlocks, blocks); ++block)
        call_with_taps<kArrays>(s.taps,
                                TapsInner<A>{s, block * L, std::min<int64_t>(L, rows - block * L)},
                                scratch.get(), body);
    });
  } else {
    // The taps of a run of pixels stay in the L1 cache.
    constexpr int64_t kPixels = 16 * L;
    const int64_t runs = ceil_div(s.pixels, kPixels);
    parallel(run, s.batch * s.filters * runs, [&](int64_t begin, int64_t end) {
      Scratch<A> scratch(kArrays * s.taps * L);
      for (int64_t index = begin; index < end; ++index) {
        const int64_t plane = index / runs, first = index % runs * kPixels;
        for (int64_t pixel = first; pixel < std::min(first + kPixels, s.pixels); pixel += L)
          call_with_taps<kArrays>(s.taps,
                                  PixelsInner<A>{s, plane / s.filters, plane % s.filters, pixel},
                                  scratch.get(), body);
      }
    });
  }
}

template <class T>
void filter_norm(const FilterNorm& n, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const FilterNormSizes& s = n.sizes;
  const auto* std = static_cast<const A*>(n.std);
  const auto* mean = static_cast<const A*>(n.mean);
  const A scale = static_cast<A>(n.scale), eps = static_cast<A>(n.eps);
  for_each_filters<A, 1>(
      s, run, [&](const auto& filters, const auto taps, A* values) __attribute__((always_inline)) {
        filters.load_all(static_cast<const T*>(n.x), values, taps);
        standardize<A, L>(values, taps, L, eps, scale);
        if (std || mean)
          for (int64_t t = 0; t < taps; ++t) {
            auto value = load<L>(values + t * L);
            if (std) value *= filters.parameter(std, t);
            if (mean) value += filters.parameter(mean, t);
            store<L>(values + t * L, value);
          }
        filters.store_all(static_cast<T*>(n.result), values, taps);
      });
}

template <class T>
void filter_norm_grad_x(const FilterNormBackward& n, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  const FilterNormSizes& s = n.sizes;
  const auto* std = static_cast<const A*>(n.std);
  const A scale = static_cast<A>(n.scale), eps = static_cast<A>(n.eps);
  for_each_filters<A, 2>(
      s, run, [&](const auto& filters, const auto taps, A* values) __attribute__((always_inline)) {
        A* const grads = values + taps * L;
        filters.load_all(static_cast<const T*>(n.x), values, taps);
        filters.load_all(static_cast<const T*>(n.grad), grads, taps);
        const auto moments = standardize<A, L>(values, taps, L, eps);
        V sum{}, product{};
        for (int64_t t = 0; t < taps; ++t) {
          V grad = load<L>(grads + t * L) * scale;
          if (std) grad *= filters.parameter(std, t);
          store<L>(grads + t * L, grad);
          sum += grad;
          product += grad * load<L>(values + t * L);
        }
        const V mean = sum / static_cast<A>(taps), slope = product * moments.slope;
        for (int64_t t = 0; t < taps; ++t)
          store<L>(values + t * L, (load<L>(grads + t * L) - mean) * moments.inverse -
                                       load<L>(values + t * L) * slope);
        filters.store_all(static_cast<T*>(n.grad_x), values, taps);
      });
}

// The gradients of the parameters, sums over images and pixels. One thread computes all of a
// filter, so that results do not depend on the number of threads.
template <class T>
void filter_norm_grad_parameters(const FilterNormBackward& n, ParallelFor run) {
  using A = Accumulate<T>;
  constexpr int L = kLanes<A>;
  const FilterNormSizes& s = n.sizes;
  auto* grad_std = static_cast<A*>(n.grad_std);
  auto* grad_mean = static_cast<A*>(n.grad_mean);
  const A scale = static_cast<A>(n.scale), eps = static_cast<A>(n.eps);
  const auto add = [&](const auto& filters, A* scratch) {
    A* const values = scratch;
    A* const grads = scratch + s.taps * L;
    A* const sums = grads + s.taps * L;
    filters.load_all(static_cast<const T*>(n.x), values, s.taps);
    filters.load_all(static_cast<const T*>(n.grad), grads, s.taps);
    standardize<A, L>(values, s.taps, L, eps);
    for (int64_t t = 0; t < s.taps; ++t) {
      const auto grad = load<L>(grads + t * L);
      store<L>(sums + 2 * t * L, load<L>(sums + 2 * t * L) + grad * load<L>(values + t * L));
      store<L>(sums + (2 * t + 1) * L, load<L>(sums + (2 * t + 1) * L) + grad);
    }
  };
  const auto write = [&](int64_t filter, int64_t t, A with_x, A alone) {
    if (grad_std) grad_std[filter * s.taps + t] = with_x * scale;
    if (grad_mean) grad_mean[filter * s.taps + t] = alone;
  };
  const int64_t size = 4 * s.taps * L;
  if (s.taps_inner) {
    parallel(run, ceil_div(s.filters, L), [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * L, count = std::min<int64_t>(L, s.filters - first);
        Scratch<A> scratch(size);
        for (int64_t row = first; row < s.batch * s.pixels * s.filters; row += s.filters)
          add(TapsInner<A>{s, row, count}, scratch.get());
        const A* sums = scratch + 2 * s.taps * L;
        for (int64_t t = 0; t < s.taps; ++t)
          for (int64_t lane = 0; lane < count; ++lane)
            write(first + lane, t, sums[2 * t * L + lane], sums[(2 * t + 1) * L + lane]);
      }
    });
  } else {
    parallel(run, s.filters, [&](int64_t begin, int64_t end) {
      for (int64_t filter = begin; filter < end; ++filter) {
        Scratch<A> scratch(size);
        for (int64_t image = 0; image < s.batch; ++image)
          for (int64_t pixel = 0; pixel < s.pixels; pixel += L)
            add(PixelsInner<A>{s, image, filter, pixel}, scratch.get());
        const A* sums = scratch + 2 * s.taps * L;
        for (int64_t t = 0; t < s.taps; ++t) {
          A totals[2] = {};
          for (int i = 0; i < 2; ++i)
            for (int lane = 0; lane < L; ++lane) totals[i] += sums[(2 * t + i) * L + lane];
          write(filter, t, totals[0], totals[1]);
        }
      }
    });
  }
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
