// The spatial branches of DDFUpPack: depthwise convolutions of the same features, each followed by
// a 1x1 convolution to few channels. Vectors run along the channels of a pixel; what is between the
// two convolutions stays in the nearest cache.
#pragma once
#include "cpu/vectors.h"

namespace ddf::cpu::DDF_ISA {
namespace {

// Pixels of a row whose depthwise sums are made before the 1x1 convolution reads them.
constexpr int kBranchPixels = 16;

// Weights of a branch in blocks of one vector of channels: the taps of the depthwise convolution,
// then the outputs of the 1x1 convolution; zero behind the last channel.
template <class T>
void pack_branch(const Branches& b, int64_t branch, Sum<T>* to) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const int64_t taps = b.kernel * b.kernel;
  const T* depthwise = static_cast<const T*>(b.depthwise) + branch * b.channels * taps;
  const T* pointwise = static_cast<const T*>(b.pointwise) + branch * b.outputs * b.channels;
  for (int64_t c = 0; c < round_up(b.channels, L); ++c) {
    A* line = to + c / L * (taps + b.outputs) * L + c % L;
    const bool is_there = c < b.channels;
    for (int64_t t = 0; t < taps; ++t)
      line[t * L] = is_there ? widen(depthwise[c * taps + t]) : A(0);
    for (int64_t o = 0; o < b.outputs; ++o)
      line[(taps + o) * L] = is_there ? widen(pointwise[o * b.channels + c]) : A(0);
  }
}

// z[p][c] of P pixels: the depthwise convolution by the taps in rows [row0, row1) and columns
// [column0, column1) of the kernel. x is the first tap of the first pixel, which may lie outside.
template <int P, class T>
DDF_INLINE void depthwise_pixels(const T* x, int64_t line, int64_t channels, int64_t kernel,
                                 int64_t row0, int64_t row1, int64_t column0, int64_t column1,
                                 const Sum<T>* weights, int64_t block, Sum<T>* z, int64_t z_step) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  int64_t step3 = 3 * channels;
  DDF_OPAQUE(step3);
  const auto filter = [&](int64_t c, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : channels - c;
    Vector<A, L> sums[P] = {};
    for (int64_t r = row0; r < row1; ++r) {
      const T* from = x + r * line + column0 * channels + c;
      const A* taps = weights + (r * kernel + column0) * L;
      for (int64_t i = column0; i < column1; ++i, from += channels, taps += L) {
        const auto tap = load<L>(taps);
        DDF_UNROLL
        for (int p = 0; p < P; ++p)
          sums[p] += load_first<L>(from + (p == 3 ? step3 : p * channels), room) * tap;
      }
    }
    DDF_UNROLL
    for (int p = 0; p < P; ++p) store<L>(z + p * z_step + c, sums[p]);
    weights += block;
  };
  int64_t c = 0;
  for (; c + L <= channels; c += L) filter(c, std::true_type());
  if (c < channels) filter(c, std::false_type());
}

// The same for a 3x3 kernel inside of the image, whose neighbours read the same pixels.
template <int P, class T>
__attribute__((noinline)) void depthwise_inside3(const T* x, int64_t line, int64_t channels,
                                                 const Sum<T>* weights, int64_t block, Sum<T>* z,
                                                 int64_t z_step) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const auto filter = [&](int64_t c, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : channels - c;
    Vector<A, L> sums[P] = {};
    DDF_UNROLL
    for (int r = 0; r < 3; ++r) {
      Vector<A, L> taps[3];
      DDF_UNROLL
      for (int i = 0; i < 3; ++i) taps[i] = load<L>(weights + (r * 3 + i) * L);
      DDF_UNROLL
      for (int q = 0; q < P + 2; ++q) {
        const auto value = load_first<L>(x + r * line + q * channels + c, room);
        DDF_UNROLL
        for (int i = 0; i < 3; ++i)
          if (const int p = q - i; p >= 0 && p < P) sums[p] += value * taps[i];
      }
    }
    DDF_UNROLL
    for (int p = 0; p < P; ++p) store<L>(z + p * z_step + c, sums[p]);
    weights += block;
  };
  int64_t c = 0;
  for (; c + L <= channels; c += L) filter(c, std::true_type());
  if (c < channels) filter(c, std::false_type());
}

// to[o] = bias[o] + sum over the channels of z * w[o], of O outputs.
template <int O, class T>
DDF_INLINE void pointwise_pixel(const Sum<T>* z, int64_t channels, const Sum<T>* weights,
                                int64_t block, const Sum<T>* bias, T* to) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  constexpr int K = O > 8 ? 16 : O > 4 ? 8 : O > 2 ? 4 : O;
  Vector<A, L> sums[K] = {};
  for (int64_t c = 0; c < channels; c += L, weights += block) {
    const auto value = load<L>(z + c);
    DDF_UNROLL
    for (int o = 0; o < O; ++o) sums[o] += value * load<L>(weights + o * L);
  }
  A totals[K];
  sum_lanes_of_each<A, L>(sums, totals);
  for (int o = 0; o < O; ++o) to[o] = narrow<T>(totals[o] + bias[o]);
}

template <class T>
__attribute__((noinline)) void pointwise_pixels(const Sum<T>* z, int64_t z_step, int64_t pixels,
                                                int64_t channels, const Sum<T>* weights,
                                                int64_t block, int64_t outputs, const Sum<T>* bias,
                                                T* to, int64_t to_step) {
  constexpr int L = kLanes<Sum<T>>;
  for (int64_t p = 0; p < pixels; ++p) {
    const Sum<T>* from = z + p * z_step;
    T* out = to + p * to_step;
    int64_t o = 0;
    for (; o + 9 <= outputs; o += 9)
      pointwise_pixel<9, T>(from, channels, weights + o * L, block, bias + o, out + o);
    for (; o + 4 <= outputs; o += 4)
      pointwise_pixel<4, T>(from, channels, weights + o * L, block, bias + o, out + o);
    for (; o < outputs; ++o)
      pointwise_pixel<1, T>(from, channels, weights + o * L, block, bias + o, out + o);
  }
}

template <class T>
void branches(const Branches& b, ParallelFor run) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const int64_t taps = b.kernel * b.kernel, pad = b.kernel / 2, line = b.width * b.channels;
  const int64_t padded = round_up(b.channels, L), block = (taps + b.outputs) * L;
  const int64_t size = padded / L * block, all_outputs = b.branches * b.outputs;
  Scratch<A> weights(b.branches * size), bias(all_outputs);
  for (int64_t n = 0; n < b.branches; ++n) pack_branch<T>(b, n, weights + n * size);
  // A pixel's depthwise bias is the same for all: what the 1x1 convolution makes of it is a bias.
  for (int64_t o = 0; o < all_outputs; ++o) {
    const T* w = static_cast<const T*>(b.pointwise) + o * b.channels;
    const T* of_branch = static_cast<const T*>(b.depthwise_bias) + o / b.outputs * b.channels;
    A sum = b.pointwise_bias ? widen(static_cast<const T*>(b.pointwise_bias)[o]) : A(0);
    for (int64_t c = 0; b.depthwise_bias && c < b.channels; ++c)
      sum += widen(w[c]) * widen(of_branch[c]);
    bias[o] = sum;
  }
  parallel(run, b.batch * b.height, [&](int64_t begin, int64_t end) {
    Scratch<A> z(kBranchPixels * padded);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index % b.height;
      const int64_t row0 = std::max<int64_t>(0, pad - row);
      const int64_t row1 = std::min(b.kernel, b.height + pad - row);
      const T* x = static_cast<const T*>(b.x) + (index - pad) * line - pad * b.channels;
      T* out = static_cast<T*>(b.output) + index * b.width * all_outputs;
      for (int64_t column = 0; column < b.width; column += kBranchPixels) {
        const int64_t count = std::min<int64_t>(kBranchPixels, b.width - column);
        for (int64_t n = 0; n < b.branches; ++n) {
          const A* of_branch = weights + n * size;
          for (int64_t p = 0; p < count;) {
            const int64_t j = column + p;
            const auto filter = [&](auto pixels, int64_t column0, int64_t column1) {
              depthwise_pixels<decltype(pixels)::value, T>(
                  x + j * b.channels, line, b.channels, b.kernel, row0, row1, column0, column1,
                  of_branch, block, z + p * padded, padded);
              p += decltype(pixels)::value;
            };
            if (p + 4 > count || j < pad || j + 3 + pad >= b.width) {
              filter(std::integral_constant<int, 1>(), std::max<int64_t>(0, pad - j),
                     std::min(b.kernel, b.width + pad - j));
            } else if (b.kernel == 3 && row1 - row0 == 3) {
              depthwise_inside3<4, T>(x + j * b.channels, line, b.channels, of_branch, block,
                                      z + p * padded, padded);
              p += 4;
            } else {
              filter(std::integral_constant<int, 4>(), 0, b.kernel);
            }
          }
          pointwise_pixels<T>(z, padded, count, padded, of_branch + taps * L, block, b.outputs,
                              bias + n * b.outputs, out + column * all_outputs + n * b.outputs,
                              all_outputs);
        }
      }
    }
  });
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
