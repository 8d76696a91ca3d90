// How many blocks a launch is cut into. By shape only, with constants in the place of the device's numbers, so that
// sums have one order everywhere; they are an H200's.
#pragma once
#include "toolchain.h"

namespace vops {

constexpr int64_t kSms = 132;
// What a block takes before and after its steps: the weights arrive in some dependent reads, sums are added up.
constexpr double kStepsOfConvBlock = 4, kGroupsOfWgradBlock = 0.5;
// A wave that leaves this share of an SM's room empty takes as long as a full one: what is there does not get faster.
constexpr double kLeastFilled = 0.5;

// The time of a launch whose blocks take one unit each where all SMs are full; `resident` are on an SM at a time.
inline double time_of_blocks(int64_t blocks, int resident) {
  const int64_t slots = kSms * resident;
  if (blocks > slots) return double(ceil_div(blocks, slots));
  const double filled = double(ceil_div(blocks, kSms)) / resident;
  return filled > kLeastFilled ? filled : kLeastFilled;
}

struct ColumnCut {
  int segments;
  double time;  // in steps of a column
};

// `blocks` walk along all columns, or segments of them, each of which reads `overlap` columns more.
inline ColumnCut cut_columns(int64_t blocks, int64_t columns, int overlap, int resident) {
  ColumnCut best = {0, 0};
  for (int segments = 1; segments == 1 || segments * int64_t(overlap) < columns; segments++) {
    const double steps = double(ceil_div(columns, int64_t(segments)) + (segments > 1 ? overlap : 0));
    const double time = time_of_blocks(blocks * segments, resident) * (steps + kStepsOfConvBlock);
    if (best.segments == 0 || time < best.time) best = {segments, time};
  }
  return best;
}

// Shares of `groups` for blocks of which `side` stand side by side: as many as fill the SMs a whole number of times.
inline int64_t cut_groups(int64_t groups, int64_t side, int resident) {
  int64_t best = 1;
  double best_time = 0;
  for (int64_t waves = 1; waves <= 4; waves++) {
    int64_t splits = waves * kSms * resident / side;
    splits = splits < 1 ? 1 : splits > groups ? groups : splits;
    const int64_t share = ceil_div(groups, splits);
    splits = ceil_div(groups, share);
    const double time = time_of_blocks(splits * side, resident) * (double(share) + kGroupsOfWgradBlock);
    if (waves == 1 || time < best_time) {
      best = splits;
      best_time = time;
    }
  }
  return best;
}

}  // namespace vops
