// How many blocks a launch is cut into. By shape only, with constants in the place of the device's numbers, so that
// sums have one order everywhere; they are an H200's.
#pragma once
#include "toolchain.h"

namespace vops {

constexpr int64_t kSms = 132;
// What a block takes before and after its steps: the weights arrive in some dependent reads, sums are added up.
constexpr double kStepsOfConvBlock = 4, kGroupsOfWgradBlock = 0.5;
constexpr double kStepsOfUnit = 1;  // until the first columns of a strip are there
// A wave that leaves this share of an SM's room empty takes as long as a full one: what is there does not get faster.
constexpr double kLeastFilled = 0.5;

// The time of a launch whose blocks take one unit each where all SMs are full; `resident` are on an SM at a time.
inline double time_of_blocks(int64_t blocks, int resident) {
  const int64_t slots = kSms * resident;
  if (blocks > slots) return double(ceil_div(blocks, slots));
  const double filled = double(ceil_div(blocks, kSms)) / resident;
  return filled > kLeastFilled ? filled : kLeastFilled;
}

struct Cut {
  int64_t splits;
  double time;
};

// Shares of `units` of work for blocks of which `side` stand side by side: as many as fill the SMs a whole number of
// times. A unit takes `each`, a block `fixed`.
inline Cut cut_units(int64_t units, int64_t side, int resident, double each, double fixed) {
  Cut best = {0, 0};
  for (int64_t waves = 1; waves <= 4; waves++) {
    int64_t splits = waves * kSms * resident / side;
    splits = splits < 1 ? 1 : splits > units ? units : splits;
    const int64_t share = ceil_div(units, splits);
    splits = ceil_div(units, share);
    const double time = time_of_blocks(splits * side, resident) * (double(share) * each + fixed);
    if (best.splits == 0 || time < best.time) best = {splits, time};
  }
  return best;
}

struct ColumnCut {
  int segments;
  int64_t splits;
  double time;  // in steps of a column
};

// `units` walk along all columns, or segments of them, each of which reads `overlap` columns more.
inline ColumnCut cut_columns(int64_t units, int64_t side, int64_t columns, int overlap, int resident) {
  ColumnCut best = {0, 0, 0};
  for (int segments = 1; segments == 1 || segments * int64_t(overlap) < columns; segments++) {
    const double steps = double(ceil_div(columns, int64_t(segments)) + (segments > 1 ? overlap : 0)) + kStepsOfUnit;
    const Cut cut = cut_units(units * segments, side, resident, steps, kStepsOfConvBlock);
    if (best.segments == 0 || cut.time < best.time) best = {segments, cut.splits, cut.time};
  }
  return best;
}

}  // namespace vops
