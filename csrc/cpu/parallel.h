// How the ops cut their work into tasks. A task is some blocks of channels, some rows and some images.
#pragma once
#include "panel_conv.h"

namespace vops {
namespace VOPS_ISA {

// Panels of one task: a second-level cache holds them, with room for what streams by.
constexpr int64_t kTaskBytes = 512 * 1024;

struct Cut {
  int64_t rows, chunks;    // rows of a chunk, chunks of an image
  int64_t images, groups;  // images of a group, groups of a batch
  RowRange rows_of(int64_t chunk, int64_t height) const { return {chunk * rows, min64(height, (chunk + 1) * rows)}; }
  RowRange images_of(int64_t group, int64_t batch) const {
    return {group * images, min64(batch, (group + 1) * images)};
  }
};

// Chunks of about kTaskBytes with at least `halo` rows, so that what neighbours compute twice stays small; smaller ones
// where there would be fewer tasks than `tasks`; several images to a task where images are small.
VOPS_INLINE Cut cut_work(int64_t batch, int64_t blocks, int64_t height, int64_t width, int64_t row_bytes, int64_t halo,
                         int64_t tasks) {
  int64_t chunks = ceil_div(height, clamp64(kTaskBytes / row_bytes, max64(halo, 1), height));
  const int64_t wanted = ceil_div(tasks, batch * blocks);
  if (chunks < wanted) chunks = min64(wanted, max64(chunks, height / max64(halo, 4)));
  const int64_t rows = ceil_div(height, chunks);
  chunks = ceil_div(height, rows);
  const int64_t small =
      clamp64(1024 / (rows * width), 1, batch);  // images that together make a task worth its overhead
  const int64_t spare = max64(1, batch * blocks * chunks / tasks);
  const int64_t images = min64(small, spare);
  return {rows, chunks, images, ceil_div(batch, images)};
}

// Blocks of channels that a task takes at once from channels_last tensors, whose cache lines and pages they share: few
// enough for their panels to fit the cache, or many where the tensor is used in place.
constexpr int64_t kPackedBlocks = 8, kDirectBlocks = 2 * kLanes;

// The tasks that keep all threads busy to the end.
VOPS_INLINE int64_t tasks_for_threads() { return 4 * max_threads(); }
// The same for weight gradients, whose sums must not depend on the number of threads.
constexpr int64_t kFixedTasks = 64;

// Runs body(task, scratch) for every task, on all threads when `work` multiply-adds are worth it.
template <class A, class Body>
VOPS_INLINE Error for_each_task(int64_t tasks, int64_t work, int64_t scratch_elements, const Body& body) {
  const auto run = [](const void* context, int64_t task, void* scratch) { (*(const Body*)context)(task, (A*)scratch); };
  return run_tasks(tasks, work, scratch_elements * sizeof(A), run, &body);
}

template <class A>
VOPS_INLINE void add_panel(A* to, const A* from, int64_t vectors) {
  for (int64_t i = 0; i < vectors * kLanes; i += kLanes) store(to + i, load(to + i) + load(from + i));
}

// Sums in two stages, cut by shape only: every (group, split) has a panel of its own that one task fills, and the
// splits of a group are added in order. [group][split][vector][lane]
template <class A>
struct PartialSums {
  A* data;
  int64_t splits, vectors;
  A* panel(int64_t group, int64_t split) const { return data + (group * splits + split) * vectors * kLanes; }
  // Adds up a group, in the place of its first panel.
  A* total(int64_t group) const {
    A* sums = panel(group, 0);
    for (int64_t i = 0; i < vectors * kLanes; i += kLanes) {
      Vec<A> sum = load(sums + i);
      for (int64_t split = 1; split < splits; split++) sum += load(sums + split * vectors * kLanes + i);
      store(sums + i, sum);
    }
    return sums;
  }
  // All groups as one.
  PartialSums joined(int64_t groups) const { return {data, groups * splits, vectors}; }
};
// The gradients of a block's weight and bias, which follows the taps.
template <class A>
VOPS_INLINE void add_splits(const PartialSums<A>& sums, int64_t taps, int64_t block, Channels c, const Tensor4& dw,
                            const Tensor4& db) {
  const A* total = sums.total(block);
  if (dw.data) unpack_rows<A>(total, 0, dw, 0, c, 0, 1);
  if (db.data) unpack_rows<A>(total + taps * kLanes, 0, db, 0, c, 0, 1);
}

}  // namespace VOPS_ISA
}  // namespace vops
