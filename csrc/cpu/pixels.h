// Kernels for channels_last (NHWC) features: vectors run along the channels of one pixel.
//
// For each pixel the taps that lie inside the image are listed, each with a pointer to the pixel it
// reads and its value of the spatial filter. The channel filter is kept widened, in blocks of one
// vector of channels with all taps.
#pragma once
#include "cpu/vectors.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// The taps of one pixel that lie inside the image.
template <class T>
struct Taps {
  explicit Taps(int64_t taps)
      : pixel(new const T*[taps]), spatial(new Sum<T>[taps]), tap(new int64_t[taps]) {}

  int64_t count = 0;
  std::unique_ptr<const T*[]> pixel;
  std::unique_ptr<Sum<T>[]> spatial;
  std::unique_ptr<int64_t[]> tap;

  void add(const T* at, Sum<T> value, int64_t t) {
    pixel[count] = at;
    spatial[count] = value;
    tap[count++] = t;
  }
};

// Along one axis: for each position of a pixel, the taps whose other end lies in the image, and
// where.
class Reach {
 public:
  struct End {
    int64_t tap, at;
  };

  // From an output pixel to the pixels of the features that it reads.
  static Reach to_features(const Geometry& g, int64_t out_size, int64_t size) {
    return Reach(out_size, g.kernel, [&](int64_t position, int64_t tap) {
      const int64_t at = position * g.stride + tap * g.dilation - g.padding();
      return at < size ? at : -1;
    });
  }
  // From a pixel of the features to the output pixels that read it.
  static Reach to_output(const Geometry& g, int64_t size, int64_t out_size) {
    return Reach(size, g.kernel, [&](int64_t position, int64_t tap) {
      const int64_t from = position + g.padding() - tap * g.dilation;
      return from >= 0 && from % g.stride == 0 && from / g.stride < out_size ? from / g.stride : -1;
    });
  }

  const End* begin(int64_t position) const { return ends_.data() + first_[position]; }
  const End* end(int64_t position) const { return ends_.data() + first_[position + 1]; }

 private:
  template <class F>
  Reach(int64_t size, int64_t kernel, const F& other_end) {
    for (int64_t position = 0; position < size; ++position) {
      first_.push_back(static_cast<int64_t>(ends_.size()));
      for (int64_t tap = 0; tap < kernel; ++tap)
        if (const int64_t at = other_end(position, tap); at >= 0) ends_.push_back({tap, at});
    }
    first_.push_back(static_cast<int64_t>(ends_.size()));
  }

  std::vector<int64_t> first_;
  std::vector<End> ends_;
};

// Lists the taps of one pixel. The spatial filter belongs to an output pixel: to this one
// (own_filter) or to the one at each tap's other end.
template <class T>
struct Lister {
  const Geometry& g;
  Reach rows, columns;
  int64_t width;  // of what the taps lead to
  const T* spatial;
  SpatialStrides strides;
  bool own_filter;
  Sum<T> neutral;

  DDF_INLINE void list(Taps<T>& taps, const T* image, const T* filter, int64_t row,
                       int64_t column) const {
    taps.count = 0;
    const T* own = filter + (own_filter ? row * strides.row + column * strides.column : 0);
    for (const auto* r = rows.begin(row); r != rows.end(row); ++r)
      for (const auto* c = columns.begin(column); c != columns.end(column); ++c) {
        const int64_t t = r->tap * g.kernel + c->tap;
        const int64_t other = own_filter ? 0 : r->at * strides.row + c->at * strides.column;
        taps.add(image + (r->at * width + c->at) * g.channels,
                 spatial ? widen(own[t * strides.tap + other]) : neutral, t);
      }
  }

  // The spatial filter of a group of an image, as list() takes it.
  const T* filter_of(int64_t image, int64_t group) const {
    return spatial ? spatial + image * strides.batch + group * g.taps() * strides.tap : nullptr;
  }
};

// The channel filter of channels [channel0, channel1) of an image, to[(v * taps + t) * L + lane];
// lanes behind the last channel are zero.
template <class T>
void fill_channel_blocks(Sum<T>* to, const Geometry& g, const T* filter, int64_t image,
                         int64_t channel0, int64_t channel1, Sum<T> neutral) {
  constexpr int L = kLanes<Sum<T>>;
  for (int64_t c = channel0; c < channel1; ++c) {
    const int64_t v = (c - channel0) / L, lane = (c - channel0) % L;
    for (int64_t t = 0; t < g.taps(); ++t)
      to[(v * g.taps() + t) * L + lane] =
          filter ? widen(filter[(image * g.channels + c) * g.taps() + t]) : neutral;
  }
}

// out[c] = sum over the listed taps of pixel[c] * (c[t, c] o spatial), for count channels. N is the
// number of taps when it is all of them and known, else 0.
template <int N, class T, class Combine>
DDF_INLINE void filter_pixel(const Taps<T>& taps, int64_t all_taps, int64_t first,
                             const Sum<T>* channel, T* out, int64_t count) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  const int64_t number = N ? N : taps.count;
  // Copies that no store to memory can change, so that they stay in registers.
  const T* pixel[N ? N : 1];
  V spatial[N ? N : 1];
  if constexpr (N > 0) {
    DDF_UNROLL
    for (int u = 0; u < N; ++u) {
      pixel[u] = taps.pixel[u] + first;
      spatial[u] = splat<A, L>(taps.spatial[u]);
    }
  }
  // wide is an integral constant: a whole vector of channels or the last few.
  const auto filter = [&](int64_t c, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : count - c;
    const A* block = channel + c * (N ? N : all_taps);
    V sum{};
    DDF_UNROLL
    for (int64_t u = 0; u < number; ++u) {
      if constexpr (N > 0) {
        sum += load_first<L>(pixel[u] + c, room) *
               Combine::combine(load<L>(block + u * L), spatial[u]);
      } else {
        sum += load_first<L>(taps.pixel[u] + first + c, room) *
               Combine::combine(load<L>(block + taps.tap[u] * L), splat<A, L>(taps.spatial[u]));
      }
    }
    store_first<L>(out + c, sum, room);
  };
  int64_t c = 0;
  for (; c + L <= count; c += L) filter(c, std::true_type());
  if (c < count) filter(c, std::false_type());
}

// Both directions: for each pixel of `to` the taps that the lister finds in `from`, filtered.
template <class T, class Combine>
void filter_pixels(const Lister<T>& lister, const T* channel_filter, const T* from,
                   int64_t from_size, T* to, int64_t rows, int64_t columns, ParallelFor run) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = lister.g;
  parallel(run, g.batch * rows, [&](int64_t begin, int64_t end) {
    Taps<T> taps(g.taps());
    const int64_t block = round_up(g.group_channels, L) * g.taps();
    Scratch<A> channel(g.groups * block);
    int64_t filled = -1;
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / rows, row = index % rows;
      const T* pixels = from + image * from_size * g.channels;
      if (image != filled)
        for (int64_t group = 0; group < g.groups; ++group)
          fill_channel_blocks(channel + group * block, g, channel_filter, image,
                              group * g.group_channels, (group + 1) * g.group_channels,
                              A(Combine::kNeutral));
      filled = image;
      for (int64_t column = 0; column < columns; ++column)
        for (int64_t group = 0; group < g.groups; ++group) {
          const int64_t first = group * g.group_channels;
          lister.list(taps, pixels, lister.filter_of(image, group), row, column);
          T* out = to + (index * columns + column) * g.channels + first;
          if (g.taps() == 9 && taps.count == 9)
            filter_pixel<9, T, Combine>(taps, 9, first, channel + group * block, out,
                                        g.group_channels);
          else
            filter_pixel<0, T, Combine>(taps, g.taps(), first, channel + group * block, out,
                                        g.group_channels);
        }
    }
  });
}

template <class T, class Combine>
void forward_pixels(const Forward& f, ParallelFor run) {
  const Geometry& g = f.geometry;
  const Lister<T> lister{g,
                         Reach::to_features(g, g.out_height, g.height),
                         Reach::to_features(g, g.out_width, g.width),
                         g.width,
                         static_cast<const T*>(f.spatial_filter),
                         f.spatial_strides,
                         true,
                         Sum<T>(Combine::kNeutral)};
  filter_pixels<T, Combine>(lister, static_cast<const T*>(f.channel_filter),
                            static_cast<const T*>(f.features), g.height * g.width,
                            static_cast<T*>(f.output), g.out_height, g.out_width, run);
}

template <class T, class Combine>
void grad_features_pixels(const Backward& b, ParallelFor run) {
  const Geometry& g = b.geometry;
  const Lister<T> lister{g,
                         Reach::to_output(g, g.height, g.out_height),
                         Reach::to_output(g, g.width, g.out_width),
                         g.out_width,
                         static_cast<const T*>(b.spatial_filter),
                         b.spatial_strides,
                         false,
                         Sum<T>(Combine::kNeutral)};
  filter_pixels<T, Combine>(lister, static_cast<const T*>(b.channel_filter),
                            static_cast<const T*>(b.grad), g.out_height * g.out_width,
                            static_cast<T*>(b.grad_features), g.height, g.width, run);
}

// With p = dy * x at each listed tap: ds[t] = sum over the channels of p * c[t], and
// dc[t, c] += p * s[t] (p alone for Add).
template <int N, class T, class Combine>
DDF_INLINE void grad_filters_pixel(const Taps<T>& taps, int64_t all_taps, int64_t first,
                                   const T* dy, const Sum<T>* channel, Sum<T>* dc, Sum<T>* ds,
                                   int64_t count) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  using V = Vector<A, L>;
  constexpr bool kMul = std::is_same_v<Combine, Mul>;
  const int64_t number = N ? N : taps.count;
  // A few taps at a time, so that their sums stay in registers.
  constexpr int kStep = N ? N : 4;
  for (int64_t u0 = 0; u0 < number; u0 += kStep) {
    const int64_t step = N ? N : std::min<int64_t>(kStep, number - u0);
    V sums[kStep] = {};
    // Copies that no store to memory can change, so that they stay in registers.
    const T* pixel[kStep];
    A spatial[kStep];
    int64_t tap[kStep];
    DDF_UNROLL
    for (int64_t u = 0; u < kStep; ++u) {
      const int64_t from = u0 + std::min(u, step - 1);
      pixel[u] = taps.pixel[from] + first;
      spatial[u] = taps.spatial[from];
      tap[u] = N ? u : taps.tap[from];
    }
    const auto add = [&](int64_t c, auto wide) __attribute__((always_inline)) {
      const int64_t room = decltype(wide)::value ? L : count - c;
      const V y = load_first<L>(dy + first + c, room);
      const int64_t block = c * (N ? N : all_taps);
      DDF_UNROLL
      for (int64_t u = 0; u < kStep; ++u) {
        if (u >= step) break;
        const int64_t at = block + (N ? u : tap[u]) * L;
        const V product = y * load_first<L>(pixel[u] + c, room);
        sums[u] += kMul ? product * load<L>(channel + at) : product;
        const V weighted = kMul ? product * splat<A, L>(spatial[u]) : product;
        store<L>(dc + at, load<L>(dc + at) + weighted);
      }
    };
    int64_t c = 0;
    for (; c + L <= count; c += L) add(c, std::true_type());
    if (c < count) add(c, std::false_type());
    DDF_UNROLL
    for (int64_t u = 0; u < kStep; ++u)
      if (u < step) ds[u0 + u] = sum_lanes<A, L>(sums[u]);
  }
}

template <class T, class Combine>
void grad_filters_pixels(const Backward& b, ParallelFor run) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const Geometry& g = b.geometry;
  const Plan plan(g, g.taps() * g.out_width * static_cast<int64_t>(sizeof(A)));
  const auto* grad = static_cast<const T*>(b.grad);
  const auto* features = static_cast<const T*>(b.features);
  const auto* channel_filter = static_cast<const T*>(b.channel_filter);
  const Lister<T> lister{g,
                         Reach::to_features(g, g.out_height, g.height),
                         Reach::to_features(g, g.out_width, g.width),
                         g.width,
                         static_cast<const T*>(b.spatial_filter),
                         b.spatial_strides,
                         true,
                         A(Combine::kNeutral)};
  const auto& strides = b.grad_spatial_strides;
  auto* grad_spatial = static_cast<T*>(b.grad_spatial);
  const int64_t maps = g.groups * g.taps(), out_size = g.out_height * g.out_width;
  const bool in_parts = grad_spatial && plan.chunks > 1;
  Scratch<A> channel_parts(g.batch * plan.tiles * g.channels * g.taps());
  Scratch<A> spatial_parts(in_parts ? plan.chunks * g.batch * maps * out_size : 0);

  parallel(run, plan.items, [&](int64_t begin, int64_t end) {
    Taps<T> taps(g.taps());
    const int64_t block = round_up(plan.chunk, L) * g.taps();
    Scratch<A> channel(block), dc(block), ds(g.taps());
    for (int64_t index = begin; index < end; ++index) {
      const auto item = plan.item(g, index);
      const int64_t count = item.channel1 - item.channel0;
      const T* pixels = features + item.image * g.height * g.width * g.channels;
      const T* filter = lister.filter_of(item.image, item.group);
      std::fill(dc.get(), dc + block, A(0));
      fill_channel_blocks(channel.get(), g, channel_filter, item.image, item.channel0,
                          item.channel1, A(Combine::kNeutral));
      for (int64_t row = item.row0; row < item.row1; ++row)
        for (int64_t column = 0; column < g.out_width; ++column) {
          lister.list(taps, pixels, filter, row, column);
          const T* dy =
              grad + ((item.image * g.out_height + row) * g.out_width + column) * g.channels;
          if (g.taps() == 9 && taps.count == 9)
            grad_filters_pixel<9, T, Combine>(taps, 9, item.channel0, dy, channel, dc, ds, count);
          else
            grad_filters_pixel<0, T, Combine>(taps, g.taps(), item.channel0, dy, channel, dc, ds,
                                              count);
          if (grad_spatial == nullptr) continue;
          int64_t u = 0;
          for (int64_t t = 0; t < g.taps(); ++t) {
            // Taps outside the image have no gradient.
            const A value = u < taps.count && taps.tap[u] == t ? ds[u++] : A(0);
            const int64_t map = item.group * g.taps() + t;
            if (in_parts)
              spatial_parts[((item.chunk * g.batch + item.image) * maps + map) * out_size +
                            row * g.out_width + column] = value;
            else
              grad_spatial[item.image * strides.batch + map * strides.tap + row * strides.row +
                           column * strides.column] = narrow<T>(value);
          }
        }
      A* to = channel_parts +
              ((item.image * plan.tiles + item.tile) * g.channels + item.channel0) * g.taps();
      for (int64_t c = 0; c < count; ++c)
        for (int64_t t = 0; t < g.taps(); ++t)
          to[c * g.taps() + t] = dc[(c / L * g.taps() + t) * L + c % L];
    }
  });
  if (b.grad_channel)
    write_grad_channel(g, plan, static_cast<T*>(b.grad_channel), channel_parts.get(), run);
  if (in_parts) write_grad_spatial(g, plan, grad_spatial, strides, spatial_parts.get(), run);
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
