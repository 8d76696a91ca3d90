#include "panel_conv.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int kRegisters = sizeof(Float) == 64 ? 32 : 16;
constexpr int kMaxTile = kRegisters == 32 ? 14 : 8;

// A tile: outputs of a row that lie `dilation` apart (with dilation 1: neighbours), so that every loaded column feeds
// up to K of them whatever the dilation. Columns [column_begin, column_end) of the tile's window exist, outputs [0,
// outputs) are kept. The tiles of `height` rows are computed one after the other.
template <class T>
struct Tile {
  const T* x;
  int64_t x_row, x_column;  // steps
  const float* w;
  int64_t w_row;
  int taps;  // rows of them
  const float* bias;
  T* y;
  int64_t y_column;
  int column_begin, column_end, outputs;
  int64_t height, next_x, next_y;  // rows, and the steps from one to the next
};

// Transposed = false: output t reads columns S*t + k. Transposed = true: output t takes the taps k = t - 2*q + K-1 of
// column q, which is how an even-aligned tile of a stride 2 input gradient meets dy.
template <int K, int S, int N, bool Transposed>
struct Window {
  static constexpr int kColumns = Transposed ? (K - 1) / 2 + (N + 1) / 2 : S * (N - 1) + K;
  // The output that tap k of column q adds to, or -1.
  static constexpr int output(int q, int k) {
    const int t = Transposed ? 2 * q - (K - 1) + k : (q - k) % S == 0 ? (q - k) / S : -1;
    return t < N && (Transposed || q >= k) ? t : -1;
  }
};

// p + step, in a way that keeps the compiler from holding every multiple of the step in a register of its own.
template <class T>
VOPS_INLINE T* stepped(T* p, int64_t step) {
  p += step;
  asm("" : "+r"(p));
  return p;
}

// How much of a tile's window may lie outside the image: nothing; up to half a kernel on either side, which is what
// "same" padding comes to and costs few comparisons; or anything, with outputs that are not there either.
enum Edge { kInner, kNear, kAny };

template <class T, int K, int S, int N, bool Transposed, Edge E>
void tile(const Tile<T>& t) {
  typedef Window<K, S, N, Transposed> W;
  const T* top = t.x;
  T* y = t.y;
  for (int64_t i = 0; i < t.height; i++, top += t.next_x, y += t.next_y) {
    Float acc[N];
    const Float bias = load(t.bias);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) acc[j] = bias;
    const T* xr = top;
    const float* wr = t.w;
    for (int r = 0; r < t.taps; r++, xr += t.x_row, wr += t.w_row) {
      Float w[K];
#pragma GCC unroll 16
      for (int k = 0; k < K; k++) w[k] = load(wr + k * kLanes);
      const T* x = xr;
#pragma GCC unroll 64
      for (int q = 0; q < W::kColumns; q++, x = stepped(x, t.x_column)) {
        if (E == kAny && (q < t.column_begin || q >= t.column_end)) continue;
        if (E == kNear && q < K / 2 && q < t.column_begin) continue;
        if (E == kNear && q >= W::kColumns - K / 2 && q >= t.column_end) continue;
        const Float v = load(x);
#pragma GCC unroll 16
        for (int k = 0; k < K; k++) {
          if (W::output(q, k) >= 0) acc[W::output(q, k)] += v * w[k];
        }
      }
    }
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
      if (E != kAny || j < t.outputs) store(y + j * t.y_column, acc[j]);
    }
  }
}

// The widths there are. More of them waste fewer outputs at the ends of rows; wider ones reload fewer columns.
constexpr int kTiles[] = {2, 4, 5, 7, 8, 10, 14};
constexpr int kTileCount = kRegisters == 32 ? 7 : 5;

template <class T>
struct TileFunctions {
  typedef void (*Function)(const Tile<T>&);
  Function by_edge[3][kTileCount];
};
#if defined(__AVX512F__)
#define VOPS_EACH_TILE(T, K, S, X, E)                                                               \
  {tile<T, K, S, 2, X, E>, tile<T, K, S, 4, X, E>,  tile<T, K, S, 5, X, E>, tile<T, K, S, 7, X, E>, \
   tile<T, K, S, 8, X, E>, tile<T, K, S, 10, X, E>, tile<T, K, S, 14, X, E>}
#else
#define VOPS_EACH_TILE(T, K, S, X, E)                                                              \
  {tile<T, K, S, 2, X, E>, tile<T, K, S, 4, X, E>, tile<T, K, S, 5, X, E>, tile<T, K, S, 7, X, E>, \
   tile<T, K, S, 8, X, E>}
#endif
#define VOPS_TILES(T, K, S, X)                                                                                \
  {                                                                                                           \
    {                                                                                                         \
      VOPS_EACH_TILE(T, K, S, X, kInner), VOPS_EACH_TILE(T, K, S, X, kNear), VOPS_EACH_TILE(T, K, S, X, kAny) \
    }                                                                                                         \
  }

enum Kind { kStride1, kStride2, kTransposed2 };
// Half types are read directly for kernel 3 only: the larger ones have enough arithmetic to hide packing behind.
template <class T>
const TileFunctions<T>& functions_of(Kind kind, int64_t) {
  static const TileFunctions<T> table[] = {VOPS_TILES(T, 3, 1, false), VOPS_TILES(T, 3, 2, false),
                                           VOPS_TILES(T, 3, 2, true)};
  return table[kind];
}
template <>
const TileFunctions<float>& functions_of(Kind kind, int64_t kernel) {
#define VOPS_EACH_KERNEL(S, X)                                                                                     \
  {                                                                                                                \
    VOPS_TILES(float, 3, S, X), VOPS_TILES(float, 5, S, X), VOPS_TILES(float, 7, S, X), VOPS_TILES(float, 9, S, X) \
  }
  static const TileFunctions<float> table[][4] = {VOPS_EACH_KERNEL(1, false), VOPS_EACH_KERNEL(2, false),
                                                  VOPS_EACH_KERNEL(2, true)};
  return table[kind][kernel / 2 - 1];
}

template <class T>
void run_tile(const TileFunctions<T>& functions, int size, int64_t window, int64_t near, Tile<T> t, int64_t x_block,
              int64_t w_block, int64_t y_block, int64_t blocks) {
  const bool full = t.outputs == kTiles[size], inner = t.column_begin == 0 && t.column_end == window;
  const bool at_edge = t.column_begin <= near && t.column_end >= window - near;
  const auto function = functions.by_edge[!full || !at_edge ? kAny : inner ? kInner : kNear][size];
  for (int64_t b = 0; b < blocks; b++, t.x += x_block, t.w += w_block, t.bias += w_block, t.y += y_block) function(t);
}

int best_tile(int64_t outputs, int64_t kernel) {
  int best = 0;
  int64_t best_cost = INT64_MAX;
  for (int i = 0; i < kTileCount; i++) {
    const int64_t cost = ceil_div(outputs, kTiles[i]) * (kTiles[i] * kernel + kernel + 8);
    if (cost <= best_cost) best = i, best_cost = cost;
  }
  return best;
}

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

int best_pair(int64_t width) {
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
    const int size = best_tile(outputs, K), N = kTiles[size];
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
  const int size = best_tile(outputs, (K + 1) / 2);
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
