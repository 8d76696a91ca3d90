// Tiles of C = A B: the rows of a tile are broadcast, its columns are vectors, and its sums stay in registers while the
// depth, the common index, is run through. B is packed in panels of kTileColumns columns and in steps of kDepth, so
// that a panel stays in a first-level cache for many tiles; A in tiles of kTileRows rows, or read in place. A last tile
// of few rows is shorter, and of few columns narrower: 64 rows, of which many layers are, are ten tiles of six and one
// of four, 48 columns a panel and a half.
#pragma once
#include "lines.h"
#include "pointwise.h"

namespace vops {
namespace VOPS_ISA {

// kEmbedded: rows whose numbers the multiply-adds broadcast themselves, once for every vector: that is a micro-op less
// and a load more each, which Intel's processors balance so, and is the same to AMD's. Tiles are then read faster than
// rows in place, which at a pitch of 4 KB lie in one set of a cache. AVX2 has six rows and no such broadcasts.
#if defined(__AVX512F__)
constexpr int kTileRows = 14, kShortRows = 8, kEmbedded = 7;
constexpr bool kReadsRowsInPlace = false;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kShortRows = 4, kEmbedded = 0;
constexpr bool kReadsRowsInPlace = true;
#else
constexpr int kTileRows = 4, kShortRows = 2, kEmbedded = 0;
constexpr bool kReadsRowsInPlace = true;
#endif
constexpr int kTileVectors = 2, kTileColumns = kTileVectors * kLanes;
// Sums are complete every so many terms, and are then added to those before: longer ones would round more.
constexpr int64_t kDepth = 192;
constexpr int64_t kLine = 64 / sizeof(float);  // of a cache
// Of packed tiles, which are [depth][kTilePitch]. Powers of two would crowd a few sets of a cache.
constexpr int64_t kTilePitch = kLanes, kPackedTile = kTilePitch * kDepth + 16;

// Element (row, depth) of A, or (column, depth) of B.
struct Matrix {
  const float* data;
  int64_t line, depth;  // strides
  Matrix from(int64_t first_line, int64_t first_depth) const {
    return {data + first_line * line + first_depth * depth, line, depth};
  }
};

struct Steps {
  int64_t count, depth;
  RowRange operator[](int64_t i) const { return {i * depth / count, (i + 1) * depth / count}; }
};
static inline Steps cut_depth(int64_t depth) { return {max64(ceil_div(depth, kDepth), 1), depth}; }

// Rows that are contiguous along the depth. In the place of rows that are not there is the last one, again.
static inline void transpose_tile(const Matrix& a, int64_t rows, int64_t depth, float* tile) {
  const float* from[kLanes];
  for (int i = 0; i < kLanes; i++) from[i] = a.data + min64(i, rows - 1) * a.line;
  for (int64_t k = 0; k < depth; k += kLanes, tile += kLanes * kTilePitch) {
    const int count = (int)min64(kLanes, depth - k);
    Float v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      __builtin_prefetch(from[i] + k + 2 * kLanes);
      v[i] = count == kLanes ? load(from[i] + k) : load_n(from[i] + k, count);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) {
      if (i < count) store(tile + i * kTilePitch, v[i]);
    }
  }
}

// Tiles of [depth][kTilePitch].
static inline void pack_tiles(const Matrix& a, int64_t rows, int64_t depth, int64_t step, float* tiles) {
  if (a.depth == 1) {
    for (int64_t r = 0; r < rows; r += kTileRows, tiles += step) {
      transpose_tile(a.from(r, 0), min64(kTileRows, rows - r), depth, tiles);
    }
    return;
  }
  for (int64_t k = 0; k < depth; k++) {
    const float* from = a.data + k * a.depth;
    float* to = tiles + k * kTilePitch;
    for (int64_t r = 0; r < rows; r += kTileRows, to += step) {
      const int count = (int)min64(kLanes, rows - r);
      if (a.line == 1) {
        store(to, count == kLanes ? load(from + r) : load_n(from + r, count));
      } else {
        for (int i = 0; i < kLanes; i++) to[i] = i < count ? from[(r + i) * a.line] : 0.f;
      }
    }
  }
}

// The tiles of some rows of A: packed, or in place but for a last one that lacks rows.
struct Tiles {
  const float* data;
  int64_t step;   // of tiles
  int64_t pitch;  // of rows in place, else 0; rows that are all the same one are packed
  const float* last;
};
static inline Tiles packed_tiles(int64_t rows, const float* data, int64_t step) {
  return {data, step, 0, data + rows / kTileRows * step};
}
static inline Tiles make_tiles(const Matrix& a, int64_t rows, int64_t depth, float* scratch) {
  const int64_t step = kTilePitch * depth + 16;
  if (a.depth != 1 || a.line == 0 || !kReadsRowsInPlace) {
    pack_tiles(a, rows, depth, step, scratch);
    return packed_tiles(rows, scratch, step);
  }
  const int64_t whole = rows / kTileRows * kTileRows;
  pack_tiles(a.from(whole, 0), rows - whole, depth, step, scratch);
  return {a.data, kTileRows * a.line, a.line, scratch};
}

// [panel][depth][column], with zeros for columns that are not there, but nothing for whole vectors of them.
static inline void pack_panels(const Matrix& b, int64_t columns, int64_t depth, float* panels) {
  int64_t first = 0;
  for (; b.line == 1 && first + kTileColumns <= columns; first += kTileColumns) {
    const float* from = b.data + first;
    float* panel = panels + first * depth;
    for (int64_t k = 0; k < depth; k++, from += b.depth, panel += kTileColumns) {
      const Float left = load(from), right = load(from + kLanes);
      store(panel, left), store(panel + kLanes, right);
    }
  }
  for (; first < columns; first += kLanes) {
    float* panel = panels + first / kTileColumns * depth * kTileColumns + first % kTileColumns;
    const float* from = b.data + first * b.line;
    const int count = (int)min64(kLanes, columns - first);
    int64_t k = 0;
    if (b.line == 1) {
      for (; count == kLanes && k < depth; k++) store(panel + k * kTileColumns, load(from + k * b.depth));
      for (; k < depth; k++) store(panel + k * kTileColumns, load_n(from + k * b.depth, count));
    }
    if (b.depth == 1) {
      for (; k + kLanes <= depth; k += kLanes) {
        Float v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) v[i] = i < count ? load(from + i * b.line + k) : Float{};
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) store(panel + (k + i) * kTileColumns, v[i]);
      }
    }
    for (; k < depth; k++) {
      for (int i = 0; i < kLanes; i++) panel[k * kTileColumns + i] = i < count ? from[i * b.line + k * b.depth] : 0.f;
    }
  }
}

// The sums of a tile.
struct Sums {
  alignas(64) float at[kTileRows][kTileColumns];
};

// Calls f(row, column, load, store) for the vectors of a tile that are there.
template <class F>
VOPS_INLINE void for_each_sum(int64_t rows, int64_t columns, const F& f) {
  const auto get = [](const float* p) { return load(p); };
  const auto put = [](float* p, Float v) { store(p, v); };
  for (int64_t r = 0; r < rows; r++) {
    if (columns == kTileColumns) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < kTileColumns; c += kLanes) f(r, c, get, put);
      continue;
    }
    int64_t c = 0;
    for (; c + kLanes <= columns; c += kLanes) f(r, c, get, put);
    const int n = (int)(columns - c);
    if (n > 0) f(r, c, [n](const float* p) { return load_n(p, n); }, [n](float* p, Float v) { store_n(p, v, n); });
  }
}

// So that what a tile ends with arrives while it, or the one before, is computed.
VOPS_INLINE void prefetch_rows(const float* p, int64_t pitch, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, p += pitch) {
    __builtin_prefetch(p, 1);
    __builtin_prefetch(p + kTileColumns - 1, 1);
  }
}

// Memory that is wanted soon: a panel's columns, every so many steps of a product's depth.
struct Ahead {
  const float* data;
  int64_t pitch, every;
};

// Where the sums of a tile go: to c, added to what is at `add`, or to a number for each row; or to memory of their own,
// where the tile lacks rows or columns or more becomes of its sums.
struct Out {
  float* c;
  int64_t pitch;
  const float* add;
  int64_t add_pitch;
  const float* row_add;
  Sums* sums;
};
VOPS_INLINE bool is_whole_tile(int64_t rows, int64_t columns) {
  return columns % kLanes == 0 && (rows == kTileRows || rows == kShortRows);
}
template <int kRows, int kVectors, class F>
VOPS_INLINE void store_rows(float* to, int64_t pitch, const F& sum) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) store(to + r * pitch + j * kLanes, sum(r, j));
  }
}
template <int kRows, int kVectors>
VOPS_INLINE void store_sums(const Float (&sums)[kRows][kVectors], const Out& out) {
  if (!out.c) {
    store_rows<kRows, kVectors>(out.sums->at[0], kTileColumns, [&](int r, int j) { return sums[r][j]; });
  } else if (out.row_add) {
    store_rows<kRows, kVectors>(out.c, out.pitch, [&](int r, int j) { return sums[r][j] + out.row_add[r]; });
  } else if (out.add_pitch == 0) {
    Float add[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) add[j] = load(out.add + j * kLanes);
    store_rows<kRows, kVectors>(out.c, out.pitch, [&](int r, int j) { return sums[r][j] + add[j]; });
  } else {
    store_rows<kRows, kVectors>(
        out.c, out.pitch, [&](int r, int j) { return sums[r][j] + load(out.add + r * out.add_pitch + j * kLanes); });
  }
}

// The loops over the depth are unrolled: a short one runs up to a tenth slower where its code straddles cache lines.

// [depth][row]
template <int kRows, int kVectors>
VOPS_INLINE void multiply_columns(const float* a, const float* b, int64_t depth, Ahead ahead, const Out& out) {
  Float sums[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ahead.data += ahead.pitch) {
    for (int64_t i = 0; i < kTileColumns; i += kLine) __builtin_prefetch(ahead.data + i);
#pragma GCC unroll 4
    for (const int64_t end = min64(k + ahead.every, depth); k < end; k++, a += kTilePitch, b += kTileColumns) {
      // The same, but the compiler does not know: it would load and broadcast a number once for both sums.
      const float* again = a;
      if (kEmbedded > 0 && kVectors > 1) asm("" : "+r"(again));
      Float column[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) column[j] = load(b + j * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; j++) sums[r][j] += column[j] * (r < kEmbedded && j > 0 ? again : a)[r];
      }
    }
  }
  store_sums(sums, out);
}

// Rows in place, `pitch` apart. Every third has a pointer: the others are displaced by a register or twice that.
template <int kVectors>
VOPS_INLINE void multiply_rows(const float* a, int64_t pitch, const float* b, int64_t depth, const Out& out) {
  constexpr int kPointers = (kTileRows + 2) / 3;
  const float* rows[kPointers];
#pragma GCC unroll 5
  for (int p = 0; p < kPointers; p++) rows[p] = a + 3 * p * pitch;
  Float sums[kTileRows][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++, b += kTileColumns) {
    Float column[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; j++) column[j] = load(b + j * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++) {
      const float value = rows[r / 3][r % 3 * pitch];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; j++) sums[r][j] += column[j] * value;
    }
#pragma GCC unroll 5
    for (int p = 0; p < kPointers; p++) {
      rows[p]++;
      asm("" : "+r"(rows[p]));
    }
  }
  store_sums(sums, out);
}

template <int kVectors>
VOPS_INLINE void multiply(const Tiles& tiles, int64_t first, int64_t rows, const float* panel, int64_t depth,
                          const Ahead& ahead, const Out& out) {
  const float* tile = rows == kTileRows ? tiles.data + first / kTileRows * tiles.step : tiles.last;
  if (kReadsRowsInPlace && rows == kTileRows && tiles.pitch) {
    multiply_rows<kVectors>(tile, tiles.pitch, panel, depth, out);
  } else if (rows > kShortRows) {
    multiply_columns<kTileRows, kVectors>(tile, panel, depth, ahead, out);
  } else {
    multiply_columns<kShortRows, kVectors>(tile, panel, depth, ahead, out);
  }
}
// A tile of so many rows, from `first` on, and of so many columns: those of a panel.
static inline void multiply_tile(const Tiles& tiles, int64_t first, int64_t rows, int64_t columns, const float* panel,
                                 int64_t depth, const Ahead& ahead, const Out& out) {
  if (columns > kLanes) {
    multiply<kTileVectors>(tiles, first, rows, panel, depth, ahead, out);
  } else {
    multiply<1>(tiles, first, rows, panel, depth, ahead, out);
  }
}

// The pixels of images that follow each other as those of one do are those of one image.
struct Pixels {
  int64_t images, count;
};
template <class... Tensors>
Pixels merged_pixels(const Tensor4& first, const Tensors&... rest) {
  const Tensor4* all[] = {&first, &rest...};
  const int64_t images = first.size[0], count = first.size[2] * first.size[3];
  bool stacked = true;
  for (const Tensor4* t : all) stacked = stacked && (!t->data || t->stride[0] == count * pixel_stride(*t));
  return stacked ? Pixels{1, images * count} : Pixels{images, count};
}
// (pixel, channel) of an image, from a pixel on.
static inline Matrix by_pixel(const Tensor4& t, int64_t n, int64_t pixel) {
  const int64_t step = pixel_stride(t);
  return {(const float*)t.data + n * t.stride[0] + pixel * step, step, t.stride[1]};
}

// In pointwise_wgrad_isa.cpp.
Error pointwise_backward_weight(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db);

}  // namespace VOPS_ISA
}  // namespace vops
