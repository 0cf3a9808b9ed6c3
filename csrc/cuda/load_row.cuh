// Loads of rows that are contiguous in memory.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

// Columns of a row that four outputs read.
constexpr int input_columns(int kernel, int stride) { return 3 * stride + kernel; }

// Columns column - Before .. column - Before + N - 1 into `to`, zeros where there are none; `line`
// points to `column`, which is inside. Vector: the width is a multiple of 4, and so is every row's
// address, in elements.
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
