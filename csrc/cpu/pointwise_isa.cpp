#include "pointwise_ending.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Fewer rows are multiplied with panels that every task packs for itself. With AVX-512 that gains up to a half on
// Intel's processors with two threads (196x512x1024), and 3 % on AMD's, where 784 rows are the same; with AVX2 a tenth
// at 196 rows on AMD's, and loses 5 % at 784.
#if defined(__AVX512F__)
constexpr int64_t kFewRows = 1500;
#else
constexpr int64_t kFewRows = 400;
#endif
constexpr int64_t kBlockRows = 96 / kTileRows * kTileRows;  // of A in a second-level cache

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

float path_scale(const Ending& end, int64_t n) {
  return end.path_scale.data ? ((const float*)end.path_scale.data)[n * end.path_scale.stride[0]] : 1.f;
}

// How the rows and the panels of a product become tasks.
struct Cut {
  int64_t rows, blocks, groups;  // rows of a task, and how many parts there are of the rows and of the panels
};
Cut cut_shared_panels(const Pixels& pixels, int64_t panels) {
  const int64_t tiles = ceil_div(pixels.count, kTileRows), wanted = tasks_for_threads();
  const int64_t rows = kTileRows * clamp64(ceil_div(tiles * pixels.images, wanted), min64(tiles, 24 / kTileRows),
                                           kBlockRows / kTileRows);
  const int64_t blocks = ceil_div(pixels.count, rows);
  return {rows, blocks, clamp64(wanted / (blocks * pixels.images), 1, panels)};
}
// A task for each thread, as short as can be: in cycles a term of the depth, of tiles and of the packing of both.
Cut cut_own_panels(int64_t pixels, int64_t panels) {
  const int64_t tiles = ceil_div(pixels, kTileRows), threads = max_threads();
  Cut best = {};
  int64_t least = INT64_MAX;
  for (int64_t blocks = 1; blocks <= min64(threads, tiles); blocks++) {
    const int64_t groups = min64(threads / blocks, panels);
    const int64_t height = ceil_div(tiles, blocks), width = ceil_div(panels, groups);
    const int64_t cycles = height * width * kTileRows * kTileVectors + (height + width * kTileVectors) * kLanes / 3;
    if (cycles >= least) continue;
    least = cycles;
    best = {height * kTileRows, ceil_div(tiles, height), groups};
  }
  return best;
}

// Neighbours in y are channels: pixels are the rows. Panels are packed, or each task packs those of `own`, one at a
// time. gamma, if there, is as long as the panels have columns, and so is what precedes packed ones, the bias.
Error multiply_panels(const Tensor4& x, int64_t matrices, const float* packed, const Matrix* own, const float* gamma,
                      const Ending& end, const Tensor4& y) {
  const int64_t image = x.size[2] * x.size[3];
  const Pixels pixels = matrices == 1 ? merged_pixels(x, y, end.z, end.kept) : Pixels{matrices, image};
  const int64_t depth = x.size[1], columns = y.size[1], panels = ceil_div(columns, kTileColumns);
  const Steps steps = cut_depth(depth);
  const Cut cut = own ? cut_own_panels(pixels.count, panels) : cut_shared_panels(pixels, panels);
  const bool apart = sums_wait_apart(end) && steps.count > 1;
  const int64_t sums_pitch = ceil_div(panels, cut.groups) * kTileColumns + kLine;
  const int64_t tiles_size = cut.rows / kTileRows * kPackedTile, panel_size = own ? kTileColumns * kDepth : 0;
  const int64_t scratch = tiles_size + panel_size + cut.rows * (1 + apart * sums_pitch);
  const int64_t tasks = pixels.images * cut.blocks * cut.groups, work = pixels.images * pixels.count * columns * depth;
  return for_each_task<float>(tasks, work, scratch, [&](int64_t task, float* tiles) {
    const int64_t n = task / cut.groups / cut.blocks, first = task / cut.groups % cut.blocks * cut.rows;
    const int64_t count = min64(cut.rows, pixels.count - first), group = task % cut.groups;
    const int64_t begin = group * panels / cut.groups * kTileColumns;
    const int64_t width = min64(columns, (group + 1) * panels / cut.groups * kTileColumns) - begin;
    const float* bias = packed + (matrices == 1 ? 0 : n * packed_size(columns, depth));
    float *panel = tiles + tiles_size, *scales = panel + panel_size, *sums = scales + cut.rows;
    for (int64_t r = 0; end.combine == kScale && r < count; r++) {
      scales[r] = path_scale(end, pixels.images == 1 ? (first + r) / image : n);
    }
    const auto place = [&](const Tensor4& t) {
      return t.data ? (float*)t.data + n * t.stride[0] + first * pixel_stride(t) + begin * t.stride[1] : nullptr;
    };
    Target to = {};
    to.c = to.sums = place(y), to.pitch = to.sums_pitch = pixel_stride(y);
    to.z = place(end.z), to.z_pitch = pixel_stride(end.z);
    to.kept = place(end.kept), to.kept_pitch = pixel_stride(end.kept);
    to.column_bias = bias + begin, to.row_scale = scales, to.column_scale = gamma ? gamma + begin : nullptr;
    if (apart) to.sums = sums, to.sums_pitch = sums_pitch;
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      const int64_t length = k.end - k.begin;
      const bool is_first = i == 0, is_last = i == steps.count - 1;
      const Tiles a = make_tiles(by_pixel(x, n, first).from(0, k.begin), count, length, tiles);
      if (!own) {
        const float* shared = bias + (1 + k.begin) * panels * kTileColumns + begin * length;
        multiply_block(a, count, shared, width, length, is_first, is_last, end, to);
      }
      for (int64_t j = 0; own && j < width; j += kTileColumns) {
        const int64_t some = min64(kTileColumns, width - j);
        pack_panels(own->from(begin + j, k.begin), some, length, panel);
        multiply_block(a, count, panel, some, length, is_first, is_last, end, to.at(0, j));
      }
    }
  });
}

void pad(const Tensor4& vector, int64_t length, int64_t padded_length, float* to) {
  for (int64_t i = 0; i < padded_length; i++) {
    to[i] = vector.data && i < length ? ((const float*)vector.data)[i * vector.stride[1]] : 0.f;
  }
}

Error forward_rows(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Ending& end, const Tensor4& y) {
  const int64_t matrices = w.size[0], columns = w.size[2], size = packed_size(columns, w.size[3]);
  const int64_t padded_columns = ceil_div(columns, kTileColumns) * kTileColumns;
  const Pixels pixels = matrices == 1 ? merged_pixels(x, y, end.z, end.kept) : Pixels{matrices, 0};
  const bool own = matrices == 1 && pixels.images == 1 && pixels.count < kFewRows;
  const int64_t packed_elements = own ? padded_columns : matrices * size;
  float* packed = (float*)thread_scratch(kSums, (packed_elements + padded_columns) * sizeof(float));
  if (!packed) return kOutOfMemory;
  float* gamma = end.gamma.data ? packed + packed_elements : nullptr;
  if (gamma) pad(end.gamma, columns, padded_columns, gamma);
  const Matrix weight = {(const float*)w.data, w.stride[2], w.stride[3]};
  if (own) {
    pad(b, columns, padded_columns, packed);
    return multiply_panels(x, 1, packed, &weight, gamma, end, y);
  }
  const Error error = pack(w, b, packed);
  return error ? error : multiply_panels(x, matrices, packed, nullptr, gamma, end, y);
}

Error forward_packed(const Tensor4& x, const float* packed, const Tensor4& y) {
  if (y.size[0] * y.size[1] * y.size[2] * y.size[3] == 0) return nullptr;
  return multiply_panels(x, 1, packed, nullptr, nullptr, {}, y);
}

// Neighbours in y are pixels: channels are the rows.
Error forward_planes(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Ending& end, const Tensor4& y) {
  const int64_t images = x.size[0], pixels = x.size[2] * x.size[3], depth = x.size[1], rows = y.size[1];
  const int64_t tiles = ceil_div(rows, kTileRows);
  const Steps steps = cut_depth(depth);
  float* weight = (float*)thread_scratch(kSums, (rows + steps.count * tiles * kPackedTile) * sizeof(float));
  if (!weight) return kOutOfMemory;
  float* bias = weight + steps.count * tiles * kPackedTile;
  for (int64_t c = 0; c < rows; c++) bias[c] = b.data ? ((const float*)b.data)[c * b.stride[1]] : 0.f;
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
  const int64_t work = images * pixels * rows * depth, panel_size = columns * min64(depth, kDepth);
  const bool apart = sums_wait_apart(end) && steps.count > 1;
  const int64_t most_rows = ceil_div(tiles, groups) * kTileRows, sums_pitch = columns + kLine;
  const int64_t scratch = panel_size + most_rows * (1 + apart * sums_pitch);
  return for_each_task<float>(images * blocks * groups, work, scratch, [&](int64_t task, float* packed) {
    const int64_t n = task / groups / blocks, first = task / groups % blocks * columns;
    const int64_t count = min64(columns, pixels - first), group = task % groups;
    const int64_t tile = group * tiles / groups, row = tile * kTileRows;
    const int64_t height = min64(rows, (group + 1) * tiles / groups * kTileRows) - row;
    const auto place = [&](const Tensor4& t) {
      return t.data ? (float*)t.data + n * t.stride[0] + row * t.stride[1] + first : nullptr;
    };
    float *scales = packed + panel_size, *sums = scales + most_rows;
    for (int64_t r = 0; end.combine == kScale && r < height; r++) {
      const float* gamma = (const float*)end.gamma.data + (row + r) * end.gamma.stride[1];
      scales[r] = path_scale(end, n) * (end.gamma.data ? *gamma : 1.f);
    }
    Target to = {};
    to.c = to.sums = place(y), to.pitch = to.sums_pitch = y.stride[1];
    to.z = place(end.z), to.z_pitch = end.z.stride[1], to.kept = place(end.kept), to.kept_pitch = end.kept.stride[1];
    to.row_bias = bias + row, to.row_scale = scales;
    if (apart) to.sums = sums, to.sums_pitch = sums_pitch;
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      pack_panels(by_pixel(x, n, first).from(0, k.begin), count, k.end - k.begin, packed);
      const Tiles a = packed_tiles(height, weight + (i * tiles + tile) * kPackedTile, kPackedTile);
      multiply_block(a, height, packed, count, k.end - k.begin, i == 0, i == steps.count - 1, end, to);
    }
  });
}

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Ending& end, const Tensor4& y) {
  if (y.size[0] * y.size[1] * y.size[2] * y.size[3] == 0) return nullptr;
  return (w.size[0] > 1 || is_channels_last(y) ? forward_rows : forward_planes)(x, w, b, end, y);
}

}  // namespace

extern const PointwiseOps pointwise_ops;
const PointwiseOps pointwise_ops = {forward, packed_size, pack, forward_packed, pointwise_backward_weight};

}  // namespace VOPS_ISA
}  // namespace vops
