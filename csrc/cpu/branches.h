// The convolutions of the branches that generate filters, for channels_last features: vectors run
// along the channels of a pixel. DDFUpPack's spatial branches are depthwise convolutions of the
// same features, each followed by a 1x1 convolution to few channels; what is between the two stays
// in the nearest cache. DDFPack's is a 1x1 convolution, whose features the channel branch pools.
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
// [column0, column1) of the kernel; with kAll3 by those of a whole 3x3 kernel, whose neighbours
// read the same pixels. x is the first tap of the first pixel, which may lie outside.
template <int P, bool kAll3, class T>
__attribute__((noinline)) void depthwise_pixels(const T* x, int64_t line, int64_t channels,
                                                int64_t kernel, int64_t row0, int64_t row1,
                                                int64_t column0, int64_t column1,
                                                const Sum<T>* weights, int64_t block, Sum<T>* z,
                                                int64_t z_step) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const auto filter = [&](int64_t c, auto wide) __attribute__((always_inline)) {
    const int64_t room = decltype(wide)::value ? L : channels - c;
    Vector<A, L> sums[P] = {};
    if constexpr (kAll3) {
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
    } else {
      for (int64_t r = row0; r < row1; ++r) {
        const T* from = x + r * line + column0 * channels + c;
        const A* taps = weights + (r * kernel + column0) * L;
        for (int64_t i = column0; i < column1; ++i, from += channels, taps += L) {
          const auto tap = load<L>(taps);
          DDF_UNROLL
          for (int p = 0; p < P; ++p) sums[p] += load_first<L>(from + p * channels, room) * tap;
        }
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
            const auto filter = [&](auto pixels, auto all3, int64_t column0, int64_t column1) {
              depthwise_pixels<decltype(pixels)::value, decltype(all3)::value, T>(
                  x + j * b.channels, line, b.channels, b.kernel, row0, row1, column0, column1,
                  of_branch, block, z + p * padded, padded);
              p += decltype(pixels)::value;
            };
            const std::integral_constant<int, 4> four;
            if (p + 4 > count || j < pad || j + 3 + pad >= b.width)
              filter(std::integral_constant<int, 1>(), std::false_type(),
                     std::max<int64_t>(0, pad - j), std::min(b.kernel, b.width + pad - j));
            else if (b.kernel == 3 && row1 - row0 == 3)
              filter(four, std::true_type(), 0, 3);
            else
              filter(four, std::false_type(), 0, b.kernel);
          }
          pointwise_pixels<T>(z, padded, count, padded, of_branch + taps * L, block, b.outputs,
                              bias + n * b.outputs, out + column * all_outputs + n * b.outputs,
                              all_outputs);
        }
      }
    }
  });
}

// A 1x1 convolution and the mean of each channel, out of one read of the features.
template <class T>
void project(const Project& p, ParallelFor run) {
  using A = Sum<T>;
  constexpr int L = kLanes<A>;
  const int64_t padded = round_up(p.channels, L), block = p.outputs * L;
  const int64_t out_height = ceil_div(p.height, p.stride), out_width = ceil_div(p.width, p.stride);
  Scratch<A> weights(padded / L * block), bias(p.outputs);
  for (int64_t o = 0; o < p.outputs; ++o) {
    for (int64_t c = 0; c < p.channels; ++c)
      weights[c / L * block + o * L + c % L] =
          widen(static_cast<const T*>(p.weight)[o * p.channels + c]);
    if (p.bias) bias[o] = widen(static_cast<const T*>(p.bias)[o]);
  }
  // Sums of rows, so that they do not depend on the number of threads.
  Scratch<A> sums(p.batch * p.height * padded);
  // Pixels that vectors can read are not copied.
  const bool is_direct = std::is_same_v<T, A> && p.channels % L == 0;
  parallel(run, p.batch * p.height, [&](int64_t begin, int64_t end) {
    Scratch<A> copies(is_direct ? 0 : kBranchPixels * padded);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t row = index % p.height;
      A* const of_row = sums + index * padded;
      T* out = static_cast<T*>(p.output) +
               (index / p.height * out_height + row / p.stride) * out_width * p.outputs;
      for (int64_t column = 0; column < p.width; column += kBranchPixels) {
        const int64_t count = std::min<int64_t>(kBranchPixels, p.width - column);
        const T* x = static_cast<const T*>(p.x) + (index * p.width + column) * p.channels;
        const A* pixels = copies;
        if constexpr (std::is_same_v<T, A>) {
          if (is_direct) pixels = x;
        }
        if (!is_direct) load_rows(copies.get(), padded, x, p.channels, count, p.channels);
        for (int64_t c = 0; c < padded; c += L) {
          Vector<A, L> totals[4] = {load<L>(of_row + c)};
          const A* from = pixels + c;
          int64_t i = 0;
          for (; i + 4 <= count; i += 4, from += 4 * padded) DDF_UNROLL
          for (int k = 0; k < 4; ++k) totals[k] += load<L>(from + k * padded);
          for (; i < count; ++i, from += padded) totals[0] += load<L>(from);
          store<L>(of_row + c, totals[0] + totals[1] + (totals[2] + totals[3]));
        }
        if (row % p.stride) continue;
        const int64_t first = round_up(column, p.stride), skipped = first - column;
        if (skipped < count)
          pointwise_pixels<T>(pixels + skipped * padded, p.stride * padded,
                              ceil_div(count - skipped, p.stride), padded, weights, block,
                              p.outputs, bias, out + first / p.stride * p.outputs, p.outputs);
      }
    }
  });
  const A count = static_cast<A>(p.height * p.width);
  parallel(run, p.batch, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      A* const total = sums + image * p.height * padded;
      for (int64_t row = 1; row < p.height; ++row)
        for (int64_t c = 0; c < padded; ++c) total[c] += total[row * padded + c];
      for (int64_t c = 0; c < p.channels; ++c)
        static_cast<T*>(p.mean)[image * p.channels + c] = narrow<T>(total[c] / count);
    }
  });
}

}  // namespace
}  // namespace ddf::cpu::DDF_ISA
