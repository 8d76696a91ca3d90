#include "panel_conv.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int kTile = sizeof(Float) == 64 ? 8 : 4;  // columns of dy that stay in registers beside the K sums

// What one row of taps of one phase of columns adds up over some rows of an image: the K sums never leave their
// registers.
struct Strip {
  const float *x, *dy;
  int64_t x_row, dy_row, x_column, dy_column;  // steps
  int64_t rows, outputs;
  // Output j reads the columns left + (j * S + k) * dilation, where they lie in [0, width).
  int64_t left, dilation, width;
  float* dw;
};

// Sums for every tap, so that as many multiply-adds are in flight as two units of latency 4 take, where registers
// allow.
template <int K>
constexpr int kCopies = K == 5 || (K == 7 && sizeof(Float) == 64) ? 2 : 1;

// dw[k] += sum_t x[S*t + k] * dy[t] over a tile of dy.
template <int K, int S, bool Edge>
VOPS_INLINE void tile(Float (&acc)[kCopies<K>][K], const float* x, int64_t x_column, const float* dy, int64_t dy_column,
                      int outputs, int64_t begin, int64_t end) {
  Float g[kTile];
#pragma GCC unroll 8
  for (int t = 0; t < kTile; t++) g[t] = !Edge || t < outputs ? load(dy + t * dy_column) : Float{};
#pragma GCC unroll 64
  for (int q = 0; q < S * (kTile - 1) + K; q++) {
    if (Edge && (q < begin || q >= end)) continue;
    const Float v = load(x + q * x_column);
#pragma GCC unroll 16
    for (int k = 0; k < K; k++) {
      const int t = (q - k) / S;
      if (q >= k && (q - k) % S == 0 && t < kTile) acc[t % kCopies<K>][k] += v * g[t];
    }
  }
}

template <int K, int S>
void strip(const Strip& s) {
  Float acc[kCopies<K>][K] = {};
  for (int64_t j = 0; j < s.outputs; j += kTile) {
    const int outputs = s.outputs - j < kTile ? (int)(s.outputs - j) : kTile;
    // The last column that a kept output can reach ends the window, so that a ragged tile wastes nothing.
    const RowRange columns = live_taps(s.left + j * S * s.dilation, s.dilation, S * (outputs - 1) + K, s.width);
    const int64_t begin = columns.begin, end = columns.end;
    const float *x = s.x + j * S * s.x_column, *dy = s.dy + j * s.dy_column;
    if (begin == 0 && end == S * (kTile - 1) + K) {
      for (int64_t r = 0; r < s.rows; r++, x += s.x_row, dy += s.dy_row) {
        tile<K, S, false>(acc, x, s.x_column, dy, s.dy_column, outputs, begin, end);
      }
    } else {
      for (int64_t r = 0; r < s.rows; r++, x += s.x_row, dy += s.dy_row) {
        tile<K, S, true>(acc, x, s.x_column, dy, s.dy_column, outputs, begin, end);
      }
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; k++) {
    Float sum = acc[0][k];
    if (kCopies<K> == 2) sum += acc[1][k];
    store(s.dw + k * kLanes, load(s.dw + k * kLanes) + sum);
  }
}

typedef void (*StripFunction)(const Strip&);
const StripFunction kStrips[2][3] = {{strip<5, 1>, strip<7, 1>, strip<9, 1>}, {strip<5, 2>, strip<7, 2>, strip<9, 2>}};

// The rows of `out` whose tap row k lies inside the image.
RowRange live_rows(RowRange out, int64_t k, int64_t height, const DwConv& f) {
  const int64_t shift = f.pad_top - k * f.dilation;  // row i reads i * stride - shift
  return {max64(out.begin, shift <= 0 ? 0 : ceil_div(shift, f.stride)),
          min64(out.end, height - 1 + shift < 0 ? 0 : (height - 1 + shift) / f.stride + 1)};
}

void conv_weight_rows_by_strips(const Panel<const float>& dy, const Panel<const float>& x, int64_t height, DwConv f,
                                RowRange out, float* dw) {
  const int64_t K = f.kernel, d = f.dilation;
  const StripFunction function = kStrips[f.stride - 1][K / 2 - 2];
  // A few rows at a time, so that what all K rows of taps read again is still in the first-level cache.
  const int64_t block = max64(1, 24 * 1024 / (dy.width * kLanes * (int64_t)sizeof(float)));
  for (int64_t begin = out.begin; begin < out.end; begin += block) {
    for (int64_t k = 0; k < K; k++) {
      const RowRange rows = live_rows({begin, min64(begin + block, out.end)}, k, height, f);
      if (rows.size() == 0) continue;
      for (int64_t phase = 0; phase < d && phase < dy.width; phase++) {
        Strip s;
        s.left = phase * f.stride - f.pad_left;
        s.x = x.at(rows.begin * f.stride - f.pad_top + k * d, s.left);
        s.dy = dy.at(rows.begin, phase);
        s.x_row = f.stride * x.row_step;
        s.dy_row = dy.row_step;
        s.x_column = d * x.column_step;
        s.dy_column = d * dy.column_step;
        s.rows = rows.size();
        s.outputs = ceil_div(dy.width - phase, d);
        s.dilation = d;
        s.width = x.width;
        s.dw = dw + k * K * kLanes;
        function(s);
      }
    }
  }
}

// Kernel 3 has registers for all nine sums, and so little arithmetic that it reads tensors directly: every vector of dy
// is loaded once, and the bias comes with it. The sums stay in registers for several tiles of a row, as many as leave
// what all blocks of a tensor read in the first-level cache.
constexpr int64_t kPatchTiles = 4;
template <class T>
struct Patch {
  const T *x, *dy;
  int64_t x_row, x_column, dy_column;  // steps
  int64_t tiles;                       // side by side, 1 where something is missing
  int row_begin, row_end, column_begin, column_end, outputs;
  float* sums;
};
template <class T, int S, bool Edge>
void patch(const Patch<T>& p) {
  Float acc[9], bias = load(p.sums + 9 * kLanes), g[kTile];
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) acc[k] = load(p.sums + k * kLanes);
  const T *corner = p.x, *dy = p.dy;
  for (int64_t i = 0; i < (Edge ? 1 : p.tiles); i++, corner += S * kTile * p.x_column, dy += kTile * p.dy_column) {
#pragma GCC unroll 8
    for (int t = 0; t < kTile; t++) {
      g[t] = !Edge || t < p.outputs ? load(dy + t * p.dy_column) : Float{};
      bias += g[t];
    }
#pragma GCC unroll 3
    for (int r = 0; r < 3; r++) {
      if (Edge && (r < p.row_begin || r >= p.row_end)) continue;
      const T* x = corner + r * p.x_row;
#pragma GCC unroll 32
      for (int q = 0; q < S * (kTile - 1) + 3; q++) {
        if (Edge && (q < p.column_begin || q >= p.column_end)) continue;
        const Float v = load(x + q * p.x_column);
#pragma GCC unroll 3
        for (int k = 0; k < 3; k++) {
          if (q >= k && (q - k) % S == 0 && (q - k) / S < kTile) acc[r * 3 + k] += v * g[(q - k) / S];
        }
      }
    }
  }
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) store(p.sums + k * kLanes, acc[k]);
  store(p.sums + 9 * kLanes, bias);
}

template <class T>
void conv_weight_rows_by_patches(const Panel<const T>& dy, const Panel<const T>& x, int64_t height, int64_t blocks,
                                 DwConv f, RowRange out, float* sums, int64_t step) {
  const int64_t d = f.dilation;
  const auto inner = f.stride == 1 ? patch<T, 1, false> : patch<T, 2, false>;
  const auto edge = f.stride == 1 ? patch<T, 1, true> : patch<T, 2, true>;
  Patch<T> p;
  p.x_row = d * x.row_step;
  p.x_column = d * x.column_step;
  p.dy_column = d * dy.column_step;
  for (int64_t i = out.begin; i < out.end; i++) {
    const int64_t top = i * f.stride - f.pad_top;
    const RowRange rows = live_taps(top, d, 3, height);
    p.row_begin = (int)rows.begin;
    p.row_end = (int)rows.end;
    for (int64_t phase = 0; phase < d && phase < dy.width; phase++) {
      const int64_t outputs = ceil_div(dy.width - phase, d);
      for (int64_t j = 0; j < outputs; j += p.tiles * kTile) {
        const int64_t column = phase + j * d, left = column * f.stride - f.pad_left;
        p.outputs = (int)min64(kTile, outputs - j);
        const int64_t window = f.stride * (p.outputs - 1) + 3;
        const RowRange columns = live_taps(left, d, window, x.width);
        p.column_begin = (int)columns.begin;
        p.column_end = (int)columns.end;
        const bool whole = rows.size() == 3 && columns.size() == window && p.outputs == kTile;
        p.tiles = 1;
        while (whole && p.tiles < kPatchTiles && j + (p.tiles + 1) * kTile <= outputs &&
               left + (f.stride * ((p.tiles + 1) * kTile - 1) + 2) * d < x.width) {
          p.tiles++;
        }
        p.x = x.at(top, left);
        p.dy = dy.at(i, column);
        p.sums = sums;
        for (int64_t b = 0; b < blocks; b++, p.x += x.block_step, p.dy += dy.block_step, p.sums += step) {
          (whole ? inner : edge)(p);
        }
      }
    }
  }
}

template <class A>
void conv_weight_rows_plain(const Panel<const A>& dy, const Panel<const A>& x, int64_t height, DwConv f, RowRange out,
                            A* dw) {
  const int64_t K = f.kernel, d = f.dilation;
  for (int64_t k = 0; k < K; k++) {
    const RowRange rows = live_rows(out, k, height, f);
    for (int64_t l = 0; l < K; l++) {
      Vec<A> acc = load(dw + (k * K + l) * kLanes);
      for (int64_t i = rows.begin; i < rows.end; i++) {
        for (int64_t j = 0; j < dy.width; j++) {
          const int64_t column = j * f.stride - f.pad_left + l * d;
          if (column < 0 || column >= x.width) continue;
          acc += load(dy.at(i, j)) * load(x.at(i * f.stride - f.pad_top + k * d, column));
        }
      }
      store(dw + (k * K + l) * kLanes, acc);
    }
  }
}

template <class T, class A>
void sum_block(const Panel<const T>& x, RowRange rows, A* out) {
  constexpr int kSums = 4;  // in flight at once
  Vec<A> acc[kSums] = {};
  for (int64_t i = rows.begin; i < rows.end; i++) {
    int64_t j = 0;
    for (; j + kSums <= x.width; j += kSums) {
#pragma GCC unroll 4
      for (int k = 0; k < kSums; k++) acc[k] += load(x.at(i, j + k));
    }
    for (; j < x.width; j++) acc[0] += load(x.at(i, j));
  }
  store(out, load(out) + ((acc[0] + acc[1]) + (acc[2] + acc[3])));
}

}  // namespace

template <class T, class A>
void sum_rows(const Panel<const T>& x, int64_t blocks, RowRange rows, A* sums, int64_t step) {
  for (int64_t b = 0; b < blocks; b++) sum_block(x.block(b), rows, sums + b * step);
}
template void sum_rows(const Panel<const float>&, int64_t, RowRange, float*, int64_t);
template void sum_rows(const Panel<const bf16>&, int64_t, RowRange, float*, int64_t);
template void sum_rows(const Panel<const f16>&, int64_t, RowRange, float*, int64_t);
template void sum_rows(const Panel<const double>&, int64_t, RowRange, double*, int64_t);

template <>
void conv_weight_rows(const Panel<const bf16>& dy, const Panel<const bf16>& x, int64_t height, int64_t blocks, DwConv f,
                      RowRange out, float* sums, int64_t step) {
  conv_weight_rows_by_patches(dy, x, height, blocks, f, out, sums, step);
}
template <>
void conv_weight_rows(const Panel<const f16>& dy, const Panel<const f16>& x, int64_t height, int64_t blocks, DwConv f,
                      RowRange out, float* sums, int64_t step) {
  conv_weight_rows_by_patches(dy, x, height, blocks, f, out, sums, step);
}
template <>
void conv_weight_rows(const Panel<const float>& dy, const Panel<const float>& x, int64_t height, int64_t blocks,
                      DwConv f, RowRange out, float* sums, int64_t step) {
  if (has_tiles(f) && f.kernel == 3) return conv_weight_rows_by_patches(dy, x, height, blocks, f, out, sums, step);
  for (int64_t b = 0; b < blocks; b++) {
    const auto function = has_tiles(f) ? conv_weight_rows_by_strips : conv_weight_rows_plain<float>;
    function(dy.block(b), x.block(b), height, f, out, sums + b * step);
  }
  sum_rows<float, float>(dy, blocks, out, sums + f.kernel * f.kernel * kLanes, step);
}
template <>
void conv_weight_rows(const Panel<const double>& dy, const Panel<const double>& x, int64_t height, int64_t blocks,
                      DwConv f, RowRange out, double* sums, int64_t step) {
  for (int64_t b = 0; b < blocks; b++) conv_weight_rows_plain(dy.block(b), x.block(b), height, f, out, sums + b * step);
  sum_rows<double, double>(dy, blocks, out, sums + f.kernel * f.kernel * kLanes, step);
}

}  // namespace VOPS_ISA
}  // namespace vops
