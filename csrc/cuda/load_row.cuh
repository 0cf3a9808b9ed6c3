// Tiles of four neighbouring outputs of a row, and loads of what they read from rows that are
// contiguous in memory.
#pragma once
#include "arguments.cuh"

namespace ddf::cuda {

constexpr int kQuadOutputs = 4;
constexpr int kTileQuads = 32;
constexpr int kBandQuads = 8;  // at most

// Quads of outputs in tiles. The image is divided into bands of a few quads in width, whose rows
// follow each other in the tiles, so that few lanes have no quad and the windows of a tile overlap.
struct QuadGrid {
  int tiles;                   // of an image
  int band_quads, band_tiles;  // quads in a row of a band, tiles of a band

  struct Place {
    int row, left;
  };
  // Of quad `quad` of a tile; it may be outside the image.
  DDF_DEVICE Place place_of(int tile, int quad) const {
    const int of_band = tile % band_tiles * kTileQuads + quad;
    const int column = tile / band_tiles * band_quads + of_band % band_quads;
    return {of_band / band_quads, column * kQuadOutputs};
  }
};

// Columns of a row of the features that four neighbouring outputs read.
constexpr int input_columns(int kernel, int stride) { return 3 * stride + kernel; }

// Loads columns column - Before to column - Before + N - 1, zeros outside the image and unless
// `row_inside`; `line` points to `column`, which is inside. Vector: the width and the addresses of
// the rows, in elements, are multiples of 4.
template <int Before, bool Vector, int N, typename T>
DDF_DEVICE void load_row(float (&to)[N], const T* line, int column, int width, bool row_inside) {
  DDF_UNROLL
  for (int quad = -4; quad < N - Before; quad += 4) {
    const int begin = quad < -Before ? -Before : quad;
    const int end = quad + 4 > N - Before ? N - Before : quad + 4;
    if (Vector && end - begin >= 2) {
      float four[4];
      const bool inside = quad == 0 || (column + quad >= 0 && column + quad < width);
      load4_if(four, line + quad, row_inside && inside);
      DDF_UNROLL
      for (int x = begin; x < end; ++x) to[x + Before] = four[x - quad];
    } else {
      DDF_UNROLL
      for (int x = begin; x < end; ++x) {
        const bool inside = x == 0 || (column + x >= 0 && column + x < width);
        to[x + Before] = load_if(line + x, row_inside && inside);
      }
    }
  }
}

}  // namespace ddf::cuda
