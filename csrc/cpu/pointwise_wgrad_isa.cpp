#include "pointwise_tile.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Sums over so many pixels are complete before they are added to others: longer ones would round more.
constexpr int64_t kSumDepth = 192;
constexpr int64_t kMaxParts = 8;  // of the pixels, with sums of their own

// (channel, pixel) of an image, from a pixel on.
Matrix by_channel(const Tensor4& t, int64_t n, int64_t pixel) {
  const Matrix m = by_pixel(t, n, pixel);
  return {m.data, m.depth, m.line};
}

// The sums of the rows of A, or those added to others. Tiles are summed for they are in a cache.
void add_row_sums(const Matrix& a, const Tiles& tiles, int64_t rows, int64_t depth, bool first, float* sums) {
  const auto add = [first](float* to, float sum) { *to = first ? sum : *to + sum; };
  for (int64_t r = 0; tiles.pitch > 0 && r < rows; r++) {
    Float sum[2] = {};
    int64_t k = 0;
    for (const float* row = a.data + r * a.line; k < depth; k += kLanes) {
      sum[k / kLanes % 2] += k + kLanes <= depth ? load(row + k) : load_n(row + k, (int)(depth - k));
    }
    add(sums + r, sum_of_lanes<float>(sum[0] + sum[1]));
  }
  static_assert(kTilePitch == kLanes);
  for (int64_t first_row = 0; !tiles.pitch && first_row < rows; first_row += kTileRows) {
    const float* column = tiles.data + first_row / kTileRows * tiles.step;
    Float sum[4] = {};
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4, column += 4 * kTilePitch) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) sum[i] += load(column + i * kTilePitch);
    }
    for (; k < depth; k++, column += kTilePitch) sum[0] += load(column);
    const Float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    for (int64_t r = first_row; r < min64(first_row + kTileRows, rows); r++) add(sums + r, total[r - first_row]);
  }
}

// C = A B, or C += A B. The columns of B arrive while those before are multiplied, and those of `next` with the last.
// Rows that lie `below` or more under the last column of a tile are left out.
void add_products(const Tiles& tiles, int64_t rows, const Matrix& b, const Matrix& next, int64_t columns, int64_t depth,
                  bool first, int64_t below, float* c, int64_t pitch, float* panel) {
  const int64_t share = ceil_div(depth, ceil_div(rows, kTileRows)), every = ceil_div(depth, share);
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const int64_t width = min64(kTileColumns, columns - j);
    pack_panels(b.from(j, 0), width, depth, panel);
    Matrix ahead = j + kTileColumns < columns ? b.from(j + kTileColumns, 0) : next;
    const int64_t end = min64(rows, j + width + below);
    for (int64_t i = 0; i < end; i += kTileRows, ahead = ahead.from(0, share)) {
      const int64_t height = min64(kTileRows, rows - i);
      float* const to = c + i * pitch + j;
      prefetch_rows(i + kTileRows < rows ? to + kTileRows * pitch : c + j + kTileColumns, pitch, kTileRows);
      static constexpr float kZeros[kTileColumns] = {};
      Sums sums;
      Out out = {is_whole_tile(height, width) ? to : nullptr, pitch, to, pitch, nullptr, &sums};
      if (first) out.add = kZeros, out.add_pitch = 0;
      multiply_tile(tiles, i, height, width, panel, depth, {ahead.data, ahead.depth, every}, out);
      if (out.c) continue;
      for_each_sum(height, width, [&](int64_t r, int64_t at, const auto& get, const auto& put) {
        const Float sum = load(sums.at[r] + at);
        put(to + r * pitch + at, first ? sum : sum + get(to + r * pitch + at));
      });
    }
  }
}

}  // namespace

// The pixels are cut into parts, by their number only, which are added in order; the matrix among the threads.
Error pointwise_backward_weight(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db) {
  const int64_t matrices = dw.data ? dw.size[0] : 1, rows = dy.size[1], columns = dw.data ? x.size[1] : 0;
  const Pixels pixels = matrices == 1 ? merged_pixels(dy, x) : Pixels{1, x.size[2] * x.size[3]};  // of a matrix
  const Steps cuts = {ceil_div(pixels.count, kSumDepth), pixels.count};                           // of an image
  const int64_t steps = pixels.images * cuts.count, parts = clamp64(steps / 4, 1, kMaxParts);
  const auto to_row = [&](int64_t matrix, int64_t row) {
    return (float*)dw.data + matrix * dw.stride[0] + row * dw.stride[2];
  };
  if (steps == 0) {
    for (int64_t r = 0; r < matrices * rows; r++) memset(to_row(r / rows, r % rows), 0, columns * sizeof(float));
    for (int64_t r = 0; db.data && r < rows; r++) ((float*)db.data)[r * db.stride[1]] = 0.f;
  }
  if (steps * rows * (db.data ? 1 : columns) == 0) return nullptr;
  const int64_t pitch = columns + kLine;  // powers of two would crowd a few sets of a cache
  float* sums = (float*)thread_scratch(kSums, (matrices * (parts - 1) * pitch + parts) * rows * sizeof(float));
  if (!sums) return kOutOfMemory;
  float* const row_sums = sums + matrices * (parts - 1) * rows * pitch;  // of every part
  const auto sums_of = [&](int64_t matrix, int64_t part) {               // but the first
    return sums + (matrix * (parts - 1) + part - 1) * rows * pitch;
  };

  // The second moments of x are symmetric: one half is multiplied, and mirrored in the end.
  bool symmetric = dy.data == x.data && rows == columns;
  for (int i = 0; i < 4; i++) symmetric = symmetric && dy.stride[i] == x.stride[i];

  const bool by_rows = rows > columns;
  const int64_t unit = by_rows ? kTileRows : kTileColumns, extent = by_rows ? rows : columns;
  const int64_t units = ceil_div(extent, unit), threads = max_threads();
  const int64_t groups = threads == 1 ? 1 : clamp64(ceil_div(2 * threads, matrices * parts), 1, max64(units / 4, 1));
  const int64_t work = x.size[0] * x.size[2] * x.size[3] * rows * max64(columns, 1);
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
      const Matrix a = from(dy, i, row), b = from(x, i, column), next = i + 1 < stop ? from(x, i + 1, column) : b;
      const Tiles tiles = make_tiles(a, height, k.end - k.begin, memory + kTileColumns * kSumDepth);
      if (db.data && column == 0) {
        add_row_sums(a, tiles, height, k.end - k.begin, i == first, row_sums + part * rows + row);
      }
      add_products(tiles, height, b, next, width, k.end - k.begin, i == first, symmetric ? column : rows,
                   c + row * c_pitch + column, c_pitch, memory);
    }
  });
  if (error) return error;
  for (int64_t r = 0; db.data && r < rows; r++) {
    float total = 0;
    for (int64_t p = 0; p < parts; p++) total += row_sums[p * rows + r];
    ((float*)db.data)[r * db.stride[1]] = total;
  }
  if (parts > 1 && columns > 0)
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

}  // namespace VOPS_ISA
}  // namespace vops
