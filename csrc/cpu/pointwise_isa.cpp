#include "activations.h"
#include "pointwise_tile.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int64_t kBlockRows = 96 / kTileRows * kTileRows;  // of A in a second-level cache

// Where the products of a task go, and what they are combined with, from its first row and column on. In an array of
// one number a column there are as many as the tiles have.
struct Target {
  float *c, *sums, *kept;  // sums wait in `sums` between the steps of the depth
  const float* z;
  int64_t pitch, sums_pitch, kept_pitch, z_pitch;
  const float *row_bias, *column_bias, *row_scale, *column_scale;

  Target at(int64_t row, int64_t column) const {
    const auto moved = [](auto* p, int64_t by) { return p ? p + by : p; };
    Target t = *this;
    t.c += row * pitch + column, t.sums += row * sums_pitch + column;
    t.kept = moved(kept, row * kept_pitch + column), t.z = moved(z, row * z_pitch + column);
    t.row_bias = moved(row_bias, row), t.column_bias = moved(column_bias, column);
    t.row_scale = moved(row_scale, row), t.column_scale = moved(column_scale, column);
    return t;
  }
};

// Ends the tiles of y. Its sums wait apart where y may be what they are combined with at the end.
bool sums_wait_apart(const Ending& end) { return end.combine == kScale || end.combine == kActivateBackward; }

// Of `values`, to the place of the sums, and of the sums to `values`: y = act(sums) or sums * act'(values),
// act(values).
template <Activation act>
void activate_tile(Combine combine, int64_t rows, int64_t columns, Sums* sums, Sums* values) {
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Float total = load(sums->at[r] + c);
      if (combine == kActivate) {
        store(sums->at[r] + c, activate<act>(total));
      } else {
        Float activated;
        store(sums->at[r] + c, activate_backward<act>(total, load(values->at[r] + c), &activated));
        store(values->at[r] + c, activated);
      }
    }
  }
}

// What comes of the sums of a tile after a step of the depth. The bias is added to the first ones: sums that begin with
// it would round more.
void end_tile(const Target& to, const Ending& end, int64_t rows, int64_t columns, bool first, bool last, Sums* sums) {
  const Combine combine = last ? end.combine : kNothing;
  const bool activates = combine == kActivate || combine == kActivateBackward;
  float* const c = last ? to.c : to.sums;
  const int64_t pitch = last ? to.pitch : to.sums_pitch;
  Sums values;
  for_each_sum(rows, columns, [&](int64_t r, int64_t i, const auto& get, const auto& put) {
    Float total = load(sums->at[r] + i);
    if (!first) total += get(to.sums + r * to.sums_pitch + i);
    if (first && to.column_bias) total += load(to.column_bias + i);
    if (first && to.row_bias) total += to.row_bias[r];
    if (first && end.combine == kPlus) total += get(to.z + r * to.z_pitch + i);
    if (combine == kTimes) total *= get(to.z + r * to.z_pitch + i);
    if (combine == kScale) {
      const Float scale = to.column_scale ? load(to.column_scale + i) * to.row_scale[r] : splat(to.row_scale[r]);
      total = get(to.z + r * to.z_pitch + i) + total * scale;
    }
    if (!activates) return put(c + r * pitch + i, total);
    store(sums->at[r] + i, total);
    if (combine == kActivateBackward) store(values.at[r] + i, get(to.z + r * to.z_pitch + i));
    if (combine == kActivate && to.kept) put(to.kept + r * to.kept_pitch + i, total);
  });
  if (!activates) return;
  with_activation(end.act,
                  [&](auto act) { activate_tile<decltype(act)::value>(combine, rows, columns, sums, &values); });
  for_each_sum(rows, columns, [&](int64_t r, int64_t i, const auto&, const auto& put) {
    put(c + r * pitch + i, load(sums->at[r] + i));
    if (combine == kActivateBackward && to.kept) put(to.kept + r * to.kept_pitch + i, load(values.at[r] + i));
  });
}

// The tiles of some rows times packed columns.
void multiply_block(const Tiles& tiles, int64_t rows, const float* panels, int64_t columns, int64_t depth, bool first,
                    bool last, const Ending& end, const Target& target) {
  const int64_t pitch = last ? target.pitch : target.sums_pitch;
  const bool more = (last && end.combine > kPlus) || (first && end.combine == kPlus);
  for (int64_t j = 0; j < columns; j += kTileColumns) {
    const float* panel = panels + j * depth;
    const int64_t width = min64(kTileColumns, columns - j);
    float* c = (last ? target.c : target.sums) + j;
    prefetch_rows(c, pitch, min64(kTileRows, rows));
    for (int64_t i = 0; i < rows; i += kTileRows, c += kTileRows * pitch) {
      const int64_t height = min64(kTileRows, rows - i);
      const bool direct = !more && is_whole_tile(height, width);
      prefetch_rows(c + kTileRows * pitch, pitch, min64(kTileRows, rows - i - kTileRows));
      if (last && end.combine > kPlus && target.z) {
        prefetch_rows(target.z + i * target.z_pitch + j, target.z_pitch, height);
      }
      if (last && target.kept) prefetch_rows(target.kept + i * target.kept_pitch + j, target.kept_pitch, height);
      Sums sums;
      Out out = {direct ? c : nullptr, pitch, nullptr, 0, nullptr, &sums};
      if (!first) {
        out.add = target.sums + i * target.sums_pitch + j, out.add_pitch = target.sums_pitch;
      } else if (target.row_bias) {
        out.row_add = target.row_bias + i;
      } else {
        out.add = target.column_bias + j;
      }
      multiply_tile(tiles, i, height, panel, depth, {panel, 0, depth}, out);
      if (!direct) end_tile(target.at(i, j), end, height, width, first, last, &sums);
    }
  }
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

float path_scale(const Ending& end, int64_t n) {
  return end.path_scale.data ? ((const float*)end.path_scale.data)[n * end.path_scale.stride[0]] : 1.f;
}

// Neighbours in y are channels: pixels are the rows. gamma, if there, is as long as the panels have columns.
Error multiply_packed(const Tensor4& x, int64_t matrices, const float* packed_matrices, const float* gamma,
                      const Ending& end, const Tensor4& y) {
  const int64_t image = x.size[2] * x.size[3];
  const Pixels pixels = matrices == 1 ? merged_pixels(x, y, end.z, end.kept) : Pixels{matrices, image};
  const int64_t depth = x.size[1], columns = y.size[1], panels = ceil_div(columns, kTileColumns);
  const int64_t padded_columns = panels * kTileColumns;
  const Steps steps = cut_depth(depth);
  const int64_t tiles = ceil_div(pixels.count, kTileRows), wanted = tasks_for_threads();
  const int64_t rows = kTileRows * clamp64(ceil_div(tiles * pixels.images, wanted), min64(tiles, 24 / kTileRows),
                                           kBlockRows / kTileRows);
  const int64_t blocks = ceil_div(pixels.count, rows), groups = clamp64(wanted / (blocks * pixels.images), 1, panels);
  const int64_t work = pixels.images * pixels.count * columns * depth;
  const bool apart = sums_wait_apart(end) && steps.count > 1;
  const int64_t sums_pitch = (ceil_div(panels, groups) * kTileColumns) + kLine,
                packed_tiles = rows / kTileRows * kPackedTile;
  const int64_t scratch = packed_tiles + rows * (1 + apart * sums_pitch);
  return for_each_task<float>(pixels.images * blocks * groups, work, scratch, [&](int64_t task, float* packed) {
    const int64_t n = task / groups / blocks, first = task / groups % blocks * rows;
    const int64_t count = min64(rows, pixels.count - first), group = task % groups;
    const int64_t begin = group * panels / groups * kTileColumns;
    const int64_t width = min64(columns, (group + 1) * panels / groups * kTileColumns) - begin;
    const float* bias = packed_matrices + (matrices == 1 ? 0 : n * packed_size(columns, depth));
    const float* weight = bias + padded_columns;
    const auto place = [&](const Tensor4& t) {
      return t.data ? (float*)t.data + n * t.stride[0] + first * pixel_stride(t) + begin * t.stride[1] : nullptr;
    };
    float *scales = packed + packed_tiles, *sums = scales + rows;
    for (int64_t r = 0; end.combine == kScale && r < count; r++) {
      scales[r] = path_scale(end, pixels.images == 1 ? (first + r) / image : n);
    }
    Target to = {place(y),
                 place(y),
                 place(end.kept),
                 place(end.z),
                 pixel_stride(y),
                 pixel_stride(y),
                 pixel_stride(end.kept),
                 pixel_stride(end.z),
                 nullptr,
                 bias + begin,
                 scales,
                 gamma ? gamma + begin : nullptr};
    if (apart) to.sums = sums, to.sums_pitch = sums_pitch;
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      const int64_t length = k.end - k.begin;
      const Tiles a = make_tiles(by_pixel(x, n, first).from(0, k.begin), count, length, packed);
      const float* panel = weight + k.begin * padded_columns + begin * length;
      multiply_block(a, count, panel, width, length, i == 0, i == steps.count - 1, end, to);
    }
  });
}

Error forward_rows(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Ending& end, const Tensor4& y) {
  const int64_t matrices = w.size[0], size = packed_size(w.size[2], w.size[3]);
  const int64_t padded_columns = ceil_div(w.size[2], kTileColumns) * kTileColumns;
  float* packed = (float*)thread_scratch(kSums, (matrices * size + padded_columns) * sizeof(float));
  if (!packed) return kOutOfMemory;
  float* gamma = end.gamma.data ? packed + matrices * size : nullptr;
  for (int64_t c = 0; gamma && c < padded_columns; c++) {
    gamma[c] = c < w.size[2] ? ((const float*)end.gamma.data)[c * end.gamma.stride[1]] : 0.f;
  }
  const Error error = pack(w, b, packed);
  return error ? error : multiply_packed(x, matrices, packed, gamma, end, y);
}

Error forward_packed(const Tensor4& x, const float* packed, const Tensor4& y) {
  if (y.size[0] * y.size[1] * y.size[2] * y.size[3] == 0) return nullptr;
  return multiply_packed(x, 1, packed, nullptr, {}, y);
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
    Target to = {place(y),           place(y),        place(end.kept), place(end.z), y.stride[1], y.stride[1],
                 end.kept.stride[1], end.z.stride[1], bias + row,      nullptr,      scales,      nullptr};
    if (apart) to.sums = sums, to.sums_pitch = sums_pitch;
    for (int64_t i = 0; i < steps.count; i++) {
      const RowRange k = steps[i];
      pack_panels(by_pixel(x, n, first).from(0, k.begin), count, k.end - k.begin, packed);
      const Tiles a = packed_tiles(matrix, height, weight + (i * tiles + tile) * kPackedTile, kPackedTile);
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
