// What becomes of the sums of a tile: a bias, a residual, a gate, an activation or its gradient.
#pragma once
#include "activations.h"
#include "pointwise_tile.h"

namespace vops {
namespace VOPS_ISA {

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
static inline bool sums_wait_apart(const Ending& end) {
  return end.combine == kScale || end.combine == kActivateBackward;
}

// sums = act(sums), or sums * act'(values) and values = act(values). Of the rows of a tile there are pairs.
template <Activation act, int kVectors>
void activate_rows(bool backward, int64_t rows, Sums* sums, Sums* values) {
  for (int64_t r = 0; r < rows; r += 2) {
    Float v[2 * kVectors], u[2 * kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kVectors; i++) v[i] = load(sums->at[r + i / kVectors] + i % kVectors * kLanes);
    if (backward) {
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kVectors; i++) u[i] = load(values->at[r + i / kVectors] + i % kVectors * kLanes);
      activate_all_backward<act>(v, u);
#pragma GCC unroll 4
      for (int i = 0; i < 2 * kVectors; i++) store(values->at[r + i / kVectors] + i % kVectors * kLanes, u[i]);
    } else {
      activate_all<act>(v);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 2 * kVectors; i++) store(sums->at[r + i / kVectors] + i % kVectors * kLanes, v[i]);
  }
}
static inline void activate_tile(Activation act, bool backward, int64_t rows, int64_t columns, Sums* sums,
                                 Sums* values) {
  static_assert(kTileRows % 2 == 0 && kShortRows % 2 == 0);
  if (backward && rows % 2) memset(values->at[rows], 0, sizeof values->at[rows]);
  with_activation(act, [&](auto of) {
    constexpr Activation kAct = decltype(of)::value;
    (columns > kLanes ? activate_rows<kAct, kTileVectors> : activate_rows<kAct, 1>)(backward, rows, sums, values);
  });
}

// What comes of the sums of a tile after a step of the depth. The bias is added to the first ones: sums that begin with
// it would round more.
static inline void end_tile(const Target& to, const Ending& end, int64_t rows, int64_t columns, bool first, bool last,
                            Sums* sums) {
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
  activate_tile(end.act, combine == kActivateBackward, rows, columns, sums, &values);
  for_each_sum(rows, columns, [&](int64_t r, int64_t i, const auto&, const auto& put) {
    put(c + r * pitch + i, load(sums->at[r] + i));
    if (combine == kActivateBackward && to.kept) put(to.kept + r * to.kept_pitch + i, load(values.at[r] + i));
  });
}

// The tiles of some rows times packed columns.
static inline void multiply_block(const Tiles& tiles, int64_t rows, const float* panels, int64_t columns, int64_t depth,
                                  bool first, bool last, const Ending& end, const Target& target) {
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
      multiply_tile(tiles, i, height, width, panel, depth, {panel, 0, depth}, out);
      if (!direct) end_tile(target.at(i, j), end, height, width, first, last, &sums);
    }
  }
}

}  // namespace VOPS_ISA
}  // namespace vops
