// C = A B by tiles: the rows of a tile are broadcast, its columns are vectors, and its sums stay in registers while the
// depth, the common index, is run through. B is packed in panels of kTileColumns columns and in steps of kDepth, so
// that a panel stays in a first-level cache for many tiles; A in tiles of kTileRows rows, where it cannot be read in
// place. A last tile of few rows is shorter: 64 rows, of which many layers are, are ten tiles of six and one of four.
#include "lines.h"
#include "pointwise.h"

namespace vops {
namespace VOPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 14, kShortRows = 8;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kShortRows = 4;
#else
constexpr int kTileRows = 4, kShortRows = 2;
#endif
constexpr int kTileVectors = 2, kTileColumns = kTileVectors * kLanes;
// A step's sums are complete before they are added to those before: longer ones would round more.
constexpr int64_t kDepth = 192;
constexpr int64_t kLine = 64 / sizeof(float);  // of a cache
// Of packed tiles. Powers of two would crowd a few sets of a cache.
constexpr int64_t kDepthPitch = kDepth + 16, kPackedTile = kTileRows * kDepthPitch + 16;
constexpr int64_t kBlockRows = 96 / kTileRows * kTileRows;  // of A in a second-level cache

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
Steps cut_depth(int64_t depth) { return {max64(ceil_div(depth, kDepth), 1), depth}; }

VOPS_INLINE void copy_line(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i < count) store_n(to + i, load_n(from + i, (int)(count - i)), (int)(count - i));
}

// [row][depth] where A is contiguous along the depth, [depth][row] else: copied, never transposed.
void pack_tiles(const Matrix& a, int64_t rows, int64_t depth, int64_t step, float* tiles) {
  if (a.depth == 1) {
    for (int64_t r = 0; r < rows; r++) {
      copy_line(a.data + r * a.line, depth, tiles + r / kTileRows * step + r % kTileRows * kDepthPitch);
    }
    for (int64_t r = rows; r % kTileRows; r++) {
      memset(tiles + r / kTileRows * step + r % kTileRows * kDepthPitch, 0, depth * sizeof(float));
    }
    return;
  }
  for (int64_t k = 0; k < depth; k++) {
    const float* from = a.data + k * a.depth;
    float* to = tiles + k * kTileRows;
    int64_t r = 0;  // the next in depth overwrites what is beyond a tile
    if (a.line == 1) {
      for (; r + kLanes <= rows; r += kTileRows, to += step) store(to, load(from + r));
    }
    for (; r < rows; r += kTileRows, to += step) {
      const int count = (int)min64(kLanes, rows - r);
      if (a.line == 1 && count < kLanes) {
        store(to, load_n(from + r, count));
      } else {
        for (int i = 0; i < kLanes; i++) to[i] = i < count ? from[(r + i) * a.line] : 0.f;
      }
    }
  }
}

// The tiles of some rows of A.
struct Tiles {
  const float* data;
  int64_t step;  // of tiles
  bool by_row;   // [row][depth], else [depth][row]
  int64_t pitch;
  const float* last;  // the last tile, if it lacks rows
};
Tiles packed_tiles(const Matrix& a, int64_t rows, const float* data, int64_t step) {
  return {data, step, a.depth == 1, kDepthPitch, data + rows / kTileRows * step};
}
// In place where neighbours in memory follow the depth, but for a last tile that lacks rows; else packed.
Tiles make_tiles(const Matrix& a, int64_t rows, int64_t depth, float* scratch) {
  const int64_t step = kTileRows * depth + 16;
  if (a.depth != 1) {
    pack_tiles(a, rows, depth, step, scratch);
    return packed_tiles(a, rows, scratch, step);
  }
  const int64_t whole = rows / kTileRows * kTileRows;
  pack_tiles(a.from(whole, 0), rows - whole, depth, step, scratch);
  return {a.data, kTileRows * a.line, true, a.line, scratch};
}

// [panel][depth][column], with zeros for columns that are not there.
void pack_panels(const Matrix& b, int64_t columns, int64_t depth, float* panels) {
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
    if (first + kLanes >= columns && first % kTileColumns == 0) {
      for (k = 0; k < depth; k++) store(panel + k * kTileColumns + kLanes, Float{});
    }
  }
}

// A tile of the result, with what belongs to it.
struct Target {
  float* c;
  const float* z;
  int64_t pitch, z_pitch;
  const float *row_bias, *column_bias;  // of which one at most is there; that of the columns is as long as the tile
  Combine combine;
};

struct Sums {
  Float at[kTileRows][kTileVectors];
};

// Calls f(row, vector, offset in c, offset in z, load, store) for the vectors of a tile that are there.
template <class F>
VOPS_INLINE void for_each_sum(const Target& to, int64_t rows, int64_t columns, const F& f) {
  const auto get = [](const float* p) { return load(p); };
  const auto put = [](float* p, Float v) { store(p, v); };
  if (rows == kTileRows && columns == kTileColumns) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; j++) f(r, j, r * to.pitch + j * kLanes, r * to.z_pitch + j * kLanes, get, put);
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; r++) {
#pragma GCC unroll 2
    for (int j = 0; j < kTileVectors; j++) {
      const int64_t c = r * to.pitch + j * kLanes, z = r * to.z_pitch + j * kLanes;
      const int n = (int)min64(columns - j * kLanes, kLanes);
      if (r >= rows || n <= 0) continue;
      if (n == kLanes) {
        f(r, j, c, z, get, put);
      } else {
        f(r, j, c, z, [n](const float* p) { return load_n(p, n); }, [n](float* p, Float v) { store_n(p, v, n); });
      }
    }
  }
}

// So that what a tile ends with arrives while it, or the one before, is computed.
VOPS_INLINE void prefetch_rows(const float* p, int64_t pitch, int64_t rows) {
  for (int64_t r = 0; r < rows; r++, p += pitch) {
    __builtin_prefetch(p, 1);
    __builtin_prefetch(p + kTileColumns - 1, 1);
  }
}

// What the sums of a tile begin with, in the first step.
VOPS_INLINE Sums first_sums(const Target& to, int64_t rows, int64_t columns) {
  Sums sums = {};
  if (to.row_bias || to.column_bias) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; r++) {
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; j++) {
        sums.at[r][j] = to.column_bias ? load(to.column_bias + j * kLanes) : splat(r < rows ? to.row_bias[r] : 0.f);
      }
    }
  }
  if (to.combine == kPlus) {
    for_each_sum(to, rows, columns, [&](int r, int j, int64_t, int64_t z, const auto& get, const auto&) {
      sums.at[r][j] += get(to.z + z);
    });
  }
  return sums;
}

// Memory that is wanted soon: a panel's columns, every so many steps of a product's depth.
struct Ahead {
  const float* data;
  int64_t pitch, every;
};

// The loops over the depth are unrolled: a short one runs up to a tenth slower where its code straddles cache lines.

// [depth][row]
template <int kRows>
VOPS_INLINE void multiply_columns(const float* a, const float* b, int64_t depth, Ahead ahead, Sums* result) {
  Sums sums = *result;
  for (int64_t k = 0; k < depth; ahead.data += ahead.pitch) {
    for (int64_t i = 0; i < kTileColumns; i += kLine) __builtin_prefetch(ahead.data + i);
#pragma GCC unroll 4
    for (const int64_t end = min64(k + ahead.every, depth); k < end; k++, a += kTileRows, b += kTileColumns) {
      const Float left = load(b), right = load(b + kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        sums.at[r][0] += left * a[r];
        sums.at[r][1] += right * a[r];
      }
    }
  }
  *result = sums;
}

// Rows `pitch` apart. Every third has a pointer: the others are displaced by a register or twice that.
template <int kRows>
VOPS_INLINE void multiply_rows(const float* a, int64_t pitch, const float* b, int64_t depth, Sums* result) {
  constexpr int kPointers = (kRows + 2) / 3;
  const float* rows[kPointers];
#pragma GCC unroll 5
  for (int p = 0; p < kPointers; p++) rows[p] = a + 3 * p * pitch;
  Sums sums = *result;
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; k++, b += kTileColumns) {
    const Float left = load(b), right = load(b + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const float value = rows[r / 3][r % 3 * pitch];
      sums.at[r][0] += left * value;
      sums.at[r][1] += right * value;
    }
#pragma GCC unroll 5
    for (int p = 0; p < kPointers; p++) {
      rows[p]++;
      asm("" : "+r"(rows[p]));
    }
  }
  *result = sums;
}

template <int kRows>
VOPS_INLINE void multiply(const Tiles& tiles, int64_t first, int64_t count, const float* panel, int64_t depth,
                          const Ahead& ahead, Sums* sums) {
  const bool whole = count == kTileRows;
  const float* tile = whole ? tiles.data + first / kTileRows * tiles.step : tiles.last;
  if (tiles.by_row) {
    multiply_rows<kRows>(tile, whole ? tiles.pitch : kDepthPitch, panel, depth, sums);
  } else {
    multiply_columns<kRows>(tile, panel, depth, ahead, sums);
  }
}
// Adds to the sums of a tile, of the rows from `first` on, its product with a panel.
VOPS_INLINE void multiply_tile(const Tiles& tiles, int64_t first, int64_t count, const float* panel, int64_t depth,
                               const Ahead& ahead, Sums* sums) {
  if (count > kShortRows) {
    multiply<kTileRows>(tiles, first, count, panel, depth, ahead, sums);
  } else {
    multiply<kShortRows>(tiles, first, count, panel, depth, ahead, sums);
  }
}

// The tiles of some rows times packed columns. target(row, column) tells where a tile goes.
template <class F>
void multiply_block(const Tiles& tiles, int64_t rows, const float* panels, int64_t columns, int64_t depth, bool first,
                    bool last, const F& target) {
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const float* panel = panels + j * depth;
    const int64_t width = min64(kTileColumns, columns - j);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const Target to = target(i, j);
      const int64_t height = min64(kTileRows, rows - i);
      const bool times = last && to.combine == kTimes;
      if (i == 0) prefetch_rows(to.c, to.pitch, height);
      prefetch_rows(to.c + kTileRows * to.pitch, to.pitch, min64(kTileRows, rows - i - kTileRows));
      if (times) prefetch_rows(to.z, to.z_pitch, height);
      Sums sums = first ? first_sums(to, height, width) : Sums{};
      multiply_tile(tiles, i, height, panel, depth, {panel, 0, depth}, &sums);
      for_each_sum(to, height, width, [&](int r, int k, int64_t c, int64_t z, const auto& get, const auto& put) {
        const Float total = first ? sums.at[r][k] : sums.at[r][k] + get(to.c + c);
        put(to.c + c, times ? total * get(to.z + z) : total);
      });
    }
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
Matrix by_pixel(const Tensor4& t, int64_t n, int64_t pixel) {
  const int64_t step = pixel_stride(t);
  return {(const float*)t.data + n * t.stride[0] + pixel * step, step, t.stride[1]};
}

// For each matrix a bias, then panels of the weight.
int64_t packed_size(int64_t outputs, int64_t inputs) {
  return ceil_div(outputs, kTileColumns) * kTileColumns * (1 + inputs);
}

Error pack(const Tensor4& w, const Tensor4& b, float* packed) {
  const int64_t columns = w.size[2], depth = w.size[3], panels = ceil_div(columns, kTileColumns);
  const int64_t padded_columns = panels * kTileColumns, matrices = w.size[0];
  const Steps steps = cut_depth(depth);
  return for_each_task<float>(matrices * panels, matrices * columns * depth, 0, [&](int64_t task, float*) {
    const int64_t n = task / panels, first = task % panels * kTileColumns, count = min64(kTileColumns, columns - first);
    const Matrix matrix = {(const float*)w.data + n * w.stride[0], w.stride[2], w.stride[3]};
    const float* bias = (const float*)b.data + (b.size[0] == 1 ? 0 : n * b.stride[0]);
    float* to = packed + n * packed_size(columns, depth);
    for (int64_t c = 0; c < kTileColumns; c++)
      to[first + c] = b.data && c < count ? bias[(first + c) * b.stride[1]] : 0.f;
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      float* panel = to + (1 + k.begin) * padded_columns + first * (k.end - k.begin);
      pack_panels(matrix.from(first, k.begin), count, k.end - k.begin, panel);
    }
  });
}

// Neighbours in y are channels: pixels are the rows.
Error multiply_packed(const Tensor4& x, int64_t matrices, const float* packed_matrices, const Tensor4& z,
                      Combine combine, const Tensor4& y) {
  const Pixels pixels = matrices == 1 ? merged_pixels(x, y, z) : Pixels{matrices, x.size[2] * x.size[3]};
  const int64_t depth = x.size[1], columns = y.size[1], panels = ceil_div(columns, kTileColumns);
  const int64_t padded_columns = panels * kTileColumns;
  const Steps steps = cut_depth(depth);
  const int64_t tiles = ceil_div(pixels.count, kTileRows), wanted = tasks_for_threads();
  const int64_t rows = kTileRows * clamp64(ceil_div(tiles * pixels.images, wanted), min64(tiles, 24 / kTileRows),
                                           kBlockRows / kTileRows);
  const int64_t blocks = ceil_div(pixels.count, rows), groups = clamp64(wanted / (blocks * pixels.images), 1, panels);
  const int64_t work = pixels.images * pixels.count * columns * depth;
  const int64_t scratch = rows / kTileRows * kPackedTile;
  return for_each_task<float>(pixels.images * blocks * groups, work, scratch, [&](int64_t task, float* packed) {
    const int64_t n = task / groups / blocks, first = task / groups % blocks * rows;
    const int64_t count = min64(rows, pixels.count - first), group = task % groups;
    const int64_t begin = group * panels / groups * kTileColumns;
    const int64_t end = min64(columns, (group + 1) * panels / groups * kTileColumns);
    const float* bias = packed_matrices + (matrices == 1 ? 0 : n * packed_size(columns, depth));
    const float* weight = bias + padded_columns;
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      const int64_t length = k.end - k.begin;
      const Tiles a = make_tiles(by_pixel(x, n, first).from(0, k.begin), count, length, packed);
      const float* panel = weight + k.begin * padded_columns + begin * length;
      float* c = (float*)y.data + n * y.stride[0] + first * pixel_stride(y) + begin;
      multiply_block(a, count, panel, end - begin, length, i == 0, i == steps.count - 1,
                     [&](int64_t row, int64_t column) {
                       const int64_t pitch = pixel_stride(y), z_pitch = pixel_stride(z);
                       Target to = {c + row * pitch + column, nullptr, pitch, z_pitch, nullptr, nullptr, combine};
                       if (combine)
                         to.z = (const float*)z.data + n * z.stride[0] + (first + row) * z_pitch + begin + column;
                       to.column_bias = bias + begin + column;
                       return to;
                     });
    }
  });
}

Error forward_rows(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& z, Combine combine,
                   const Tensor4& y) {
  float* packed = (float*)thread_scratch(kSums, w.size[0] * packed_size(w.size[2], w.size[3]) * sizeof(float));
  if (!packed) return kOutOfMemory;
  const Error error = pack(w, b, packed);
  return error ? error : multiply_packed(x, w.size[0], packed, z, combine, y);
}

Error forward_packed(const Tensor4& x, const float* packed, const Tensor4& y) {
  if (y.size[0] * y.size[1] * y.size[2] * y.size[3] == 0) return nullptr;
  return multiply_packed(x, 1, packed, {}, kNothing, y);
}

// Neighbours in y are pixels: channels are the rows.
Error forward_planes(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& z, Combine combine,
                     const Tensor4& y) {
  const int64_t images = x.size[0], pixels = x.size[2] * x.size[3], depth = x.size[1], rows = y.size[1];
  const int64_t tiles = ceil_div(rows, kTileRows);
  const Steps steps = cut_depth(depth);
  float* weight = (float*)thread_scratch(kSums, (rows + steps.count * tiles * kPackedTile) * sizeof(float));
  if (!weight) return kOutOfMemory;
  float* bias = weight + steps.count * tiles * kPackedTile;
  for (int64_t c = 0; b.data && c < rows; c++) bias[c] = ((const float*)b.data)[c * b.stride[1]];
  const Matrix matrix = {(const float*)w.data, w.stride[2], w.stride[3]};
  Error error = for_each_task<float>(tiles, rows * depth, 0, [&](int64_t tile, float*) {
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      const int64_t first = tile * kTileRows, count = min64(kTileRows, rows - first);
      pack_tiles(matrix.from(first, k.begin), count, k.end - k.begin, kPackedTile,
                 weight + (i * tiles + tile) * kPackedTile);
    }
  });
  if (error) return error;

  const int64_t panels = ceil_div(pixels, kTileColumns), wanted = tasks_for_threads();
  const int64_t columns = kTileColumns * clamp64(ceil_div(panels * images, wanted), 1, 128 / kTileColumns);
  const int64_t blocks = ceil_div(pixels, columns), groups = clamp64(wanted / (blocks * images), 1, tiles);
  const int64_t work = images * pixels * rows * depth, length = min64(depth, kDepth);
  return for_each_task<float>(images * blocks * groups, work, columns * length, [&](int64_t task, float* packed) {
    const int64_t n = task / groups / blocks, first = task / groups % blocks * columns;
    const int64_t count = min64(columns, pixels - first), group = task % groups;
    const int64_t begin = group * tiles / groups, end = min64(rows, (group + 1) * tiles / groups * kTileRows);
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      pack_panels(by_pixel(x, n, first).from(0, k.begin), count, k.end - k.begin, packed);
      float* c = (float*)y.data + n * y.stride[0] + first;
      const float* tiles_of_task = weight + (i * tiles + begin) * kPackedTile;
      const Tiles a = packed_tiles(matrix, end - begin * kTileRows, tiles_of_task, kPackedTile);
      multiply_block(
          a, end - begin * kTileRows, packed, count, k.end - k.begin, i == 0, i == steps.count - 1,
          [&](int64_t row, int64_t column) {
            row += begin * kTileRows;
            Target to = {c + row * y.stride[1] + column, nullptr, y.stride[1], z.stride[1], nullptr, nullptr, combine};
            if (combine) to.z = (const float*)z.data + n * z.stride[0] + row * z.stride[1] + first + column;
            if (b.data) to.row_bias = bias + row;
            return to;
          });
    }
  });
}

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& z, Combine combine,
              const Tensor4& y) {
  if (y.size[0] * y.size[1] * y.size[2] * y.size[3] == 0) return nullptr;
  return (w.size[0] > 1 || is_channels_last(y) ? forward_rows : forward_planes)(x, w, b, z, combine, y);
}

// Sums over so many pixels are complete before they are added to others: longer ones would round more.
constexpr int64_t kSumDepth = 192;
constexpr int64_t kMaxParts = 8;  // of the pixels, with sums of their own

// (channel, pixel) of an image, from a pixel on.
Matrix by_channel(const Tensor4& t, int64_t n, int64_t pixel) {
  const Matrix m = by_pixel(t, n, pixel);
  return {m.data, m.depth, m.line};
}

// C = A B, or C += A B. The columns of B arrive while those before are multiplied, and those of `next` with the last.
// Rows that lie `below` or more under the last column of a tile are left out.
void add_products(const Matrix& a, int64_t rows, const Matrix& b, const Matrix& next, int64_t columns, int64_t depth,
                  bool first, int64_t below, float* c, int64_t pitch, float* scratch) {
  float* panel = scratch;
  const Tiles tiles = make_tiles(a, rows, depth, panel + kTileColumns * kSumDepth);
  const int64_t share = ceil_div(depth, ceil_div(rows, kTileRows)), every = ceil_div(depth, share);
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const int64_t width = min64(kTileColumns, columns - j);
    pack_panels(b.from(j, 0), width, depth, panel);
    Matrix ahead = j + kTileColumns < columns ? b.from(j + kTileColumns, 0) : next;
    const int64_t end = min64(rows, j + width + below);
    for (int64_t i = 0; i < end; i += kTileRows, ahead = ahead.from(0, share)) {
      const int64_t height = min64(kTileRows, rows - i);
      const Target to = {c + i * pitch + j, nullptr, pitch, 0, nullptr, nullptr, kNothing};
      prefetch_rows(i + kTileRows < rows ? to.c + kTileRows * pitch : c + j + kTileColumns, pitch, kTileRows);
      Sums sums = {};
      multiply_tile(tiles, i, height, panel, depth, {ahead.data, ahead.depth, every}, &sums);
      for_each_sum(to, height, width, [&](int r, int k, int64_t at, int64_t, const auto& get, const auto& put) {
        put(to.c + at, first ? sums.at[r][k] : sums.at[r][k] + get(to.c + at));
      });
    }
  }
}

// The pixels are cut into parts, by their number only, which are added in order; the matrix among the threads.
Error backward_weight(const Tensor4& dy, const Tensor4& x, const Tensor4& dw) {
  const int64_t matrices = dw.size[0], rows = dw.size[2], columns = dw.size[3];
  const Pixels pixels = matrices == 1 ? merged_pixels(dy, x) : Pixels{1, x.size[2] * x.size[3]};  // of a matrix
  const Steps cuts = {ceil_div(pixels.count, kSumDepth), pixels.count};                           // of an image
  const int64_t steps = pixels.images * cuts.count, parts = clamp64(steps / 4, 1, kMaxParts);
  const auto to_row = [&](int64_t matrix, int64_t row) {
    return (float*)dw.data + matrix * dw.stride[0] + row * dw.stride[2];
  };
  if (steps == 0) {
    for (int64_t r = 0; r < matrices * rows; r++) memset(to_row(r / rows, r % rows), 0, columns * sizeof(float));
  }
  if (steps * rows * columns == 0) return nullptr;
  const int64_t pitch = columns + kLine;  // powers of two would crowd a few sets of a cache
  float* sums = (float*)thread_scratch(kSums, matrices * (parts - 1) * rows * pitch * sizeof(float));
  if (!sums) return kOutOfMemory;
  const auto sums_of = [&](int64_t matrix, int64_t part) {  // but the first
    return sums + (matrix * (parts - 1) + part - 1) * rows * pitch;
  };

  // The second moments of x are symmetric: one half is multiplied, and mirrored in the end.
  bool symmetric = dy.data == x.data && rows == columns;
  for (int i = 0; i < 4; i++) symmetric = symmetric && dy.stride[i] == x.stride[i];

  const bool by_rows = rows > columns;
  const int64_t unit = by_rows ? kTileRows : kTileColumns, extent = by_rows ? rows : columns;
  const int64_t units = ceil_div(extent, unit), threads = omp_get_max_threads();
  const int64_t groups = threads == 1 ? 1 : clamp64(ceil_div(2 * threads, matrices * parts), 1, max64(units / 4, 1));
  const int64_t work = x.size[0] * x.size[2] * x.size[3] * rows * columns;
  const int64_t scratch = kTileColumns * kSumDepth + ceil_div(rows, kTileRows) * kPackedTile;
  Error error = for_each_task<float>(matrices * parts * groups, work, scratch, [&](int64_t task, float* memory) {
    const int64_t matrix = task / groups / parts, part = task / groups % parts, group = task % groups;
    const int64_t begin = group * units / groups * unit, end = min64((group + 1) * units / groups * unit, extent);
    const int64_t row = by_rows ? begin : 0, column = by_rows ? 0 : begin;
    const int64_t height = by_rows ? end - begin : rows, width = by_rows ? columns : end - begin;
    float* c = part == 0 ? to_row(matrix, 0) : sums_of(matrix, part);
    const int64_t c_pitch = part == 0 ? dw.stride[2] : pitch;
    const auto from = [&](const Tensor4& t, int64_t step, int64_t channel) {
      return by_channel(t, matrix + step / cuts.count, cuts[step % cuts.count].begin).from(channel, 0);
    };
    const int64_t first = part * steps / parts, stop = (part + 1) * steps / parts;
    for (int64_t i = first; i < stop; i++) {
      const RowRange k = cuts[i % cuts.count];
      const Matrix b = from(x, i, column), next = i + 1 < stop ? from(x, i + 1, column) : b;
      add_products(from(dy, i, row), height, b, next, width, k.end - k.begin, i == first, symmetric ? column : rows,
                   c + row * c_pitch + column, c_pitch, memory);
    }
  });
  if (error) return error;
  if (parts > 1)
    error = for_each_task<float>(matrices * rows, matrices * parts * rows * columns, 0, [&](int64_t task, float*) {
      const int64_t matrix = task / rows, row = task % rows;
      float* to = to_row(matrix, row);
      for_each_vector(columns, [&](int64_t i, const auto& get, const auto& put) {
        Float total = get(to + i);
        for (int64_t p = 1; p < parts; p++) total += get(sums_of(matrix, p) + row * pitch + i);
        put(to + i, total);
      });
    });
  if (error || !symmetric) return error;
  return for_each_task<float>(matrices * rows, matrices * rows * columns, 0, [&](int64_t task, float*) {
    const int64_t matrix = task / rows, row = task % rows;
    for (int64_t c = 0; c < row; c++) to_row(matrix, row)[c] = to_row(matrix, c)[row];
  });
}

}  // namespace

extern const PointwiseOps pointwise_ops;
const PointwiseOps pointwise_ops = {forward, packed_size, pack, forward_packed, backward_weight};

}  // namespace VOPS_ISA
}  // namespace vops
