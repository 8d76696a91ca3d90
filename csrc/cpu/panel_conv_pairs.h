// The 3x3 convolution with stride 1 and dilation 1.
#pragma once
#include "panel_conv_tiles.h"

namespace vops {
namespace VOPS_ISA {

// Kernel 3, stride 1, dilation 1 has so little arithmetic that loads and conversions show: two rows of outputs share
// them. So do calls: several tiles are computed side by side, as many as leave what all blocks of a tensor read in the
// first-level cache.
constexpr int64_t kPairTiles = 4;
template <class T>
struct Pair {
  const T* x;
  int64_t x_row, x_column;
  const float *w, *bias;
  T* y;
  int64_t y_row, y_column;
  int64_t tiles;  // 1 where something is missing
  int row_begin, row_end, column_begin, column_end, outputs;
};
constexpr int kPairWidths[] = {4, kRegisters == 32 ? 7 : 5, kRegisters == 32 ? 8 : 6}, kPairCount = 3;

static inline int best_pair(int64_t width) {
  auto cost = [&](int i) { return ceil_div(width, kPairWidths[i]) * (18 * kPairWidths[i] + 10); };
  int best = 0;
  for (int i = 1; i < kPairCount; i++) {
    if (cost(i) < cost(best)) best = i;
  }
  return best;
}

template <class T, int N, bool Edge>
void pair(const Pair<T>& t) {
  const T* corner = t.x;
  T* y = t.y;
  for (int64_t i = 0; i < (Edge ? 1 : t.tiles); i++, corner += N * t.x_column, y += N * t.y_column) {
    Float acc[2][N], w[9];
    const Float bias = load(t.bias);
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) w[k] = load(t.w + k * kLanes);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) acc[0][j] = acc[1][j] = bias;
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      if (Edge && (r < t.row_begin || r >= t.row_end)) continue;
      const T* x = corner + r * t.x_row;
#pragma GCC unroll 16
      for (int q = 0; q < N + 2; q++) {
        if (Edge && (q < t.column_begin || q >= t.column_end)) continue;
        const Float v = load(x + q * t.x_column);
#pragma GCC unroll 2
        for (int o = 0; o < 2; o++) {
#pragma GCC unroll 3
          for (int k = 0; k < 3; k++) {
            if (r >= o && r - o < 3 && q >= k && q - k < N) acc[o][q - k] += v * w[(r - o) * 3 + k];
          }
        }
      }
    }
#pragma GCC unroll 2
    for (int o = 0; o < 2; o++) {
#pragma GCC unroll 16
      for (int j = 0; j < N; j++) {
        if (!Edge || j < t.outputs) store(y + o * t.y_row + j * t.y_column, acc[o][j]);
      }
    }
  }
}

template <class T>
void conv_row_pairs(const Panel<const T>& x, int64_t height, const Weights<float>& w, int64_t blocks, DwConv f,
                    RowRange out, const Panel<T>& y) {
  typedef void (*Function)(const Pair<T>&);
#define VOPS_EACH_PAIR(Edge)                                                                    \
  {                                                                                             \
    pair<T, kPairWidths[0], Edge>, pair<T, kPairWidths[1], Edge>, pair<T, kPairWidths[2], Edge> \
  }
  static const Function inner[] = VOPS_EACH_PAIR(false), edge[] = VOPS_EACH_PAIR(true);
#undef VOPS_EACH_PAIR
  const int size = best_pair(y.width), width = kPairWidths[size];
  Pair<T> t;
  t.x_row = x.row_step;
  t.x_column = x.column_step;
  t.y_row = y.row_step;
  t.y_column = y.column_step;
  for (int64_t i = out.begin; i < out.end; i += 2) {
    const RowRange rows = live_taps(i - f.pad_top, 1, 4, height);
    t.row_begin = (int)rows.begin;
    t.row_end = (int)rows.end;
    for (int64_t j = 0; j < y.width; j += t.tiles * width) {
      const RowRange columns = live_taps(j - f.pad_left, 1, width + 2, x.width);
      t.column_begin = (int)columns.begin;
      t.column_end = (int)columns.end;
      t.outputs = (int)min64(width, y.width - j);
      const bool whole = rows.size() == 4 && columns.size() == width + 2 && t.outputs == width;
      const int64_t end = min64(x.width + f.pad_left - 2, y.width);  // of the outputs whose taps are all there
      t.tiles = whole ? min64(kPairTiles, (end - j) / width) : 1;
      t.x = x.at(i - f.pad_top, j - f.pad_left);
      t.y = y.at(i, j);
      t.w = w.taps;
      t.bias = w.bias;
      for (int64_t b = 0; b < blocks;
           b++, t.x += x.block_step, t.y += y.block_step, t.w += w.block_step, t.bias += w.block_step) {
        (whole ? inner : edge)[size](t);
      }
    }
  }
}

}  // namespace VOPS_ISA
}  // namespace vops
