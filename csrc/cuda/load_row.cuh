// Loads from rows that are contiguous in memory.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

// Columns of a row of the features that four neighbouring outputs read.
constexpr int input_columns(int kernel, int stride) { return 3 * stride + kernel; }

// Loads columns column - Before to column - Before + N - 1, zeros outside the image; `line` points
// to `column`, which is inside. Vector: the width and the addresses of the rows, in elements, are
// multiples of 4.
template <int Before, bool Vector, int N, typename T>
DDF_DEVICE void load_row(float (&to)[N], const T* line, int column, int width) {
  DDF_UNROLL
  for (int i = 0; i < N; ++i) to[i] = 0.f;
  DDF_UNROLL
  for (int quad = -4; quad < N - Before; quad += 4) {
    const int begin = quad < -Before ? -Before : quad;
    const int end = quad + 4 > N - Before ? N - Before : quad + 4;
    if (Vector && end - begin >= 2) {
      if (quad != 0 && (column + quad < 0 || column + quad >= width)) continue;
      float four[4];
      load4(four, line + quad);
      DDF_UNROLL
      for (int x = begin; x < end; ++x) to[x + Before] = four[x - quad];
    } else {
      DDF_UNROLL
      for (int x = begin; x < end; ++x) {
        if (x == 0 || (column + x >= 0 && column + x < width)) to[x + Before] = load(line + x);
      }
    }
  }
}

}  // namespace ddf::cuda
