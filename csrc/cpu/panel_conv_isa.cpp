#include "panel_conv_pairs.h"

namespace vops {
namespace VOPS_ISA {
namespace {

template <class T>
void conv_rows_tiled(const Panel<const T>& x, int64_t height, const Weights<float>& w, int64_t blocks, DwConv f,
                     RowRange out, const Panel<T>& y) {
  const int64_t K = f.kernel, d = f.dilation;
  if (K == 3 && d == 1 && f.stride == 1 && out.size() >= 2) {
    conv_row_pairs(x, height, w, blocks, f, {out.begin, out.end - out.size() % 2}, y);
    if (out.size() % 2 == 0) return;
    out.begin = out.end - 1;
  }
  const TileFunctions<T>& functions = functions_of<T>(f.stride == 1 ? kStride1 : kStride2, K);
  Tile<T> t;
  t.x_row = d * x.row_step;
  t.x_column = d * x.column_step;
  t.w_row = K * kLanes;
  t.bias = w.bias;
  t.y_column = d * y.column_step;
  t.next_x = f.stride * x.row_step;
  t.next_y = y.row_step;
  const int64_t last_whole = (height - 1 - (K - 1) * d + f.pad_top) / f.stride;  // row that has all taps, if any
  for (int64_t phase = 0; phase < d && phase < y.width; phase++) {
    const int64_t outputs = ceil_div(y.width - phase, d);
    const int size = best_tile(functions, outputs, K), N = kTiles[size];
    const int64_t window = f.stride * (N - 1) + K;
    for (int64_t j = 0; j < outputs; j += N) {
      // The last tile rather computes some outputs again than be cut short.
      const int64_t first = max64(0, min64(j, outputs - N));
      const int64_t column = phase + first * d, left = column * f.stride - f.pad_left;
      const RowRange columns = live_taps(left, d, window, x.width);
      t.column_begin = (int)columns.begin;
      t.column_end = (int)columns.end;
      t.outputs = (int)min64(N, outputs - first);
      for (int64_t i = out.begin; i < out.end; i += t.height) {
        const int64_t top = i * f.stride - f.pad_top;
        const RowRange taps = live_taps(top, d, K, height);
        t.taps = (int)taps.size();
        // Blocks of a tensor, as against those of packed panels, share cache lines: row by row.
        t.height = taps.size() == K && blocks == 1 ? min64(last_whole + 1, out.end) - i : 1;
        t.w = w.taps + taps.begin * t.w_row;
        t.x = x.at(top + taps.begin * d, left);
        t.y = y.at(i, column);
        run_tile(functions, size, window, K / 2, t, x.block_step, w.block_step, y.block_step, blocks);
      }
    }
  }
}

// Stride 2, dilation 1: every row and column of dx takes every second tap.
template <class T>
void conv_transposed_rows_tiled(const Panel<const T>& dy, int64_t out_height, const Weights<float>& w, int64_t blocks,
                                DwConv f, RowRange in, const Panel<T>& dx) {
  const int64_t K = f.kernel;
  const TileFunctions<T>& functions = functions_of<T>(kTransposed2, K);
  // Tiles start on columns whose distance from the padded edge is even; the first may hang over the left edge by one.
  const int64_t first = -(f.pad_left & 1), outputs = dx.width - first;
  const int size = best_tile(functions, outputs, (K + 1) / 2);
  const int64_t step = kTiles[size] & ~1;  // even, so that all tiles are aligned alike
  const int64_t window = (K - 1) / 2 + (kTiles[size] + 1) / 2;
  Tile<T> t;
  t.x_row = -dy.row_step;
  t.x_column = dy.column_step;
  t.w_row = 2 * K * kLanes;
  t.height = 1;
  t.next_x = t.next_y = 0;
  for (int64_t i = in.begin; i < in.end; i++) {
    int64_t k = (i + f.pad_top) & 1, row = (i + f.pad_top - k) / 2;
    if (row >= out_height) {
      k += 2 * (row - out_height + 1);
      row = out_height - 1;
    }
    t.taps = k < K ? (int)min64((K - 1 - k) / 2 + 1, row + 1) : 0;
    for (int64_t j = first; j < dx.width; j += step) {
      const int64_t column = (j + f.pad_left) / 2 - (K - 1) / 2;
      const RowRange columns = live_taps(column, 1, window, dy.width);
      t.column_begin = (int)columns.begin;
      t.column_end = (int)columns.end;
      t.outputs = (int)min64(kTiles[size], dx.width - j);
      t.x = dy.at(row, column);
      t.w = w.taps + k * K * kLanes;
      t.bias = w.bias;
      if (j >= 0) {
        t.y = dx.at(i, j);
        t.y_column = dx.column_step;
        run_tile(functions, size, window, K / 2, t, dy.block_step, w.block_step, dx.block_step, blocks);
        continue;
      }
      T spill[kMaxTile * kLanes];
      t.y_column = kLanes;
      for (int64_t b = 0; b < blocks; b++, t.x += dy.block_step, t.w += w.block_step, t.bias += w.block_step) {
        t.y = spill;
        functions.by_edge[kAny][size](t);
        for (int o = 1; o < t.outputs; o++) store(dx.at(i, o - 1) + b * dx.block_step, load(spill + o * kLanes));
      }
    }
  }
}

template <class A>
void conv_rows_plain(const Panel<const A>& x, int64_t height, const Weights<A>& w, DwConv f, RowRange out,
                     const Panel<A>& y) {
  const int64_t K = f.kernel, d = f.dilation;
  for (int64_t i = out.begin; i < out.end; i++) {
    const int64_t top = i * f.stride - f.pad_top;
    const RowRange rows = live_taps(top, d, K, height);
    for (int64_t j = 0; j < y.width; j++) {
      const int64_t left = j * f.stride - f.pad_left;
      const RowRange columns = live_taps(left, d, K, x.width);
      Vec<A> acc = load(w.bias);
      for (int64_t k = rows.begin; k < rows.end; k++) {
        for (int64_t l = columns.begin; l < columns.end; l++) {
          acc += load(x.at(top + k * d, left + l * d)) * load(w.taps + (k * K + l) * kLanes);
        }
      }
      store(y.at(i, j), acc);
    }
  }
}

template <class A>
void conv_transposed_rows_plain(const Panel<const A>& dy, int64_t out_height, const Weights<A>& w, DwConv f,
                                RowRange in, const Panel<A>& dx) {
  const int64_t K = f.kernel, d = f.dilation, s = f.stride;
  for (int64_t i = in.begin; i < in.end; i++) {
    for (int64_t j = 0; j < dx.width; j++) {
      Vec<A> acc = load(w.bias);
      for (int64_t k = 0; k < K; k++) {
        const int64_t row = i + f.pad_top - k * d;
        if (row < 0 || row % s != 0 || row / s >= out_height) continue;
        for (int64_t l = 0; l < K; l++) {
          const int64_t column = j + f.pad_left - l * d;
          if (column < 0 || column % s != 0 || column / s >= dy.width) continue;
          acc += load(dy.at(row / s, column / s)) * load(w.taps + (k * K + l) * kLanes);
        }
      }
      store(dx.at(i, j), acc);
    }
  }
}

template <class A>
void conv_rows_plain(const Panel<const A>& x, int64_t height, const Weights<A>& w, int64_t blocks, DwConv f,
                     RowRange out, const Panel<A>& y) {
  for (int64_t b = 0; b < blocks; b++) conv_rows_plain(x.block(b), height, w.block(b), f, out, y.block(b));
}
template <class A>
void conv_transposed_rows_plain(const Panel<const A>& dy, int64_t out_height, const Weights<A>& w, int64_t blocks,
                                DwConv f, RowRange in, const Panel<A>& dx) {
  for (int64_t b = 0; b < blocks; b++)
    conv_transposed_rows_plain(dy.block(b), out_height, w.block(b), f, in, dx.block(b));
}

bool has_transposed_tiles(const DwConv& f) { return has_tiles(f) && f.stride == 2 && f.dilation == 1; }

}  // namespace

#define VOPS_HALF(T)                                                                                               \
  template <>                                                                                                      \
  void conv_rows(const Panel<const T>& x, int64_t height, const Weights<float>& w, int64_t blocks, DwConv f,       \
                 RowRange out, const Panel<T>& y) {                                                                \
    conv_rows_tiled(x, height, w, blocks, f, out, y);                                                              \
  }                                                                                                                \
  template <>                                                                                                      \
  void conv_transposed_rows(const Panel<const T>& dy, int64_t out_height, const Weights<float>& w, int64_t blocks, \
                            DwConv f, RowRange in, const Panel<T>& dx) {                                           \
    conv_transposed_rows_tiled(dy, out_height, w, blocks, f, in, dx);                                              \
  }
VOPS_HALF(bf16)
VOPS_HALF(f16)

template <>
void conv_rows(const Panel<const float>& x, int64_t height, const Weights<float>& w, int64_t blocks, DwConv f,
               RowRange out, const Panel<float>& y) {
  if (has_tiles(f)) return conv_rows_tiled(x, height, w, blocks, f, out, y);
  conv_rows_plain(x, height, w, blocks, f, out, y);
}
template <>
void conv_transposed_rows(const Panel<const float>& dy, int64_t out_height, const Weights<float>& w, int64_t blocks,
                          DwConv f, RowRange in, const Panel<float>& dx) {
  if (has_transposed_tiles(f)) return conv_transposed_rows_tiled(dy, out_height, w, blocks, f, in, dx);
  conv_transposed_rows_plain(dy, out_height, w, blocks, f, in, dx);
}
template <>
void conv_rows(const Panel<const double>& x, int64_t height, const Weights<double>& w, int64_t blocks, DwConv f,
               RowRange out, const Panel<double>& y) {
  conv_rows_plain(x, height, w, blocks, f, out, y);
}
template <>
void conv_transposed_rows(const Panel<const double>& dy, int64_t out_height, const Weights<double>& w, int64_t blocks,
                          DwConv f, RowRange in, const Panel<double>& dx) {
  conv_transposed_rows_plain(dy, out_height, w, blocks, f, in, dx);
}

}  // namespace VOPS_ISA
}  // namespace vops
