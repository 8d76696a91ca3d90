// Tiles of a convolution: some outputs of a row, whose sums stay in registers, for every kernel size and stride.
#pragma once
#include "panel_conv.h"

namespace vops {
namespace VOPS_ISA {

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
enum Kind { kStride1, kStride2, kTransposed2 };
// Some are enough where networks hardly go, stride 2 with large kernels and kernel 3 without neighbours to pair with,
// and for half types.
template <class T>
constexpr bool has_width(int kernel, Kind kind, int width) {
  if (sizeof(T) == sizeof(float) && (kernel == 3) != (kind == kStride1)) return true;
  if (width == 4 || width == kMaxTile) return true;
  return kind == kTransposed2 ? width == 10 : width == 7 || width == 8;
}

template <class T>
struct TileFunctions {
  typedef void (*Function)(const Tile<T>&);
  Function by_edge[3][kTileCount];  // null for widths that are not there
};
template <class T, int K, Kind kind, Edge E, int i>
constexpr typename TileFunctions<T>::Function tile_function() {
  if constexpr (!has_width<T>(K, kind, kTiles[i])) return nullptr;
  if constexpr (has_width<T>(K, kind, kTiles[i])) {
    constexpr int S = kind == kStride1 ? 1 : 2;
    return tile<T, K, S, kTiles[i], kind == kTransposed2, E>;
  }
}
#if defined(__AVX512F__)
#define VOPS_EACH_TILE(T, K, kind, E)                                                                       \
  {tile_function<T, K, kind, E, 0>(), tile_function<T, K, kind, E, 1>(), tile_function<T, K, kind, E, 2>(), \
   tile_function<T, K, kind, E, 3>(), tile_function<T, K, kind, E, 4>(), tile_function<T, K, kind, E, 5>(), \
   tile_function<T, K, kind, E, 6>()}
#else
#define VOPS_EACH_TILE(T, K, kind, E)                                                                       \
  {tile_function<T, K, kind, E, 0>(), tile_function<T, K, kind, E, 1>(), tile_function<T, K, kind, E, 2>(), \
   tile_function<T, K, kind, E, 3>(), tile_function<T, K, kind, E, 4>()}
#endif
#define VOPS_TILES(T, K, kind)                                                                                \
  {                                                                                                           \
    {                                                                                                         \
      VOPS_EACH_TILE(T, K, kind, kInner), VOPS_EACH_TILE(T, K, kind, kNear), VOPS_EACH_TILE(T, K, kind, kAny) \
    }                                                                                                         \
  }

// Half types are read directly for kernel 3 only: the larger ones have enough arithmetic to hide packing behind.
template <class T>
const TileFunctions<T>& functions_of(Kind kind, int64_t) {
  static const TileFunctions<T> table[] = {VOPS_TILES(T, 3, kStride1), VOPS_TILES(T, 3, kStride2),
                                           VOPS_TILES(T, 3, kTransposed2)};
  return table[kind];
}
template <>
inline const TileFunctions<float>& functions_of(Kind kind, int64_t kernel) {
#define VOPS_EACH_KERNEL(kind)                                                                                     \
  {                                                                                                                \
    VOPS_TILES(float, 3, kind), VOPS_TILES(float, 5, kind), VOPS_TILES(float, 7, kind), VOPS_TILES(float, 9, kind) \
  }
  static const TileFunctions<float> table[][4] = {VOPS_EACH_KERNEL(kStride1), VOPS_EACH_KERNEL(kStride2),
                                                  VOPS_EACH_KERNEL(kTransposed2)};
  return table[kind][kernel / 2 - 1];
}
#undef VOPS_EACH_TILE
#undef VOPS_TILES
#undef VOPS_EACH_KERNEL

template <class T>
void run_tile(const TileFunctions<T>& functions, int size, int64_t window, int64_t near, Tile<T> t, int64_t x_block,
              int64_t w_block, int64_t y_block, int64_t blocks) {
  const bool full = t.outputs == kTiles[size], inner = t.column_begin == 0 && t.column_end == window;
  const bool at_edge = t.column_begin <= near && t.column_end >= window - near;
  const auto function = functions.by_edge[!full || !at_edge ? kAny : inner ? kInner : kNear][size];
  for (int64_t b = 0; b < blocks; b++, t.x += x_block, t.w += w_block, t.bias += w_block, t.y += y_block) function(t);
}

template <class T>
int best_tile(const TileFunctions<T>& functions, int64_t outputs, int64_t kernel) {
  int best = 0;
  int64_t best_cost = INT64_MAX;
  for (int i = 0; i < kTileCount; i++) {
    if (!functions.by_edge[kAny][i]) continue;
    const int64_t cost = ceil_div(outputs, kTiles[i]) * (kTiles[i] * kernel + kernel + 8);
    if (cost <= best_cost) best = i, best_cost = cost;
  }
  return best;
}

}  // namespace VOPS_ISA
}  // namespace vops
