// How attention within windows is cut into tasks, and how the tokens of a window become panels.
#pragma once
#include "parallel.h"
#include "products.h"
#include "relative_attention.h"

namespace vops {
namespace VOPS_ISA {

constexpr int64_t kLeastQueries = 64;  // of a task that shares its head with others

struct Task {
  int64_t sample, head, window, part;
  int64_t top, left, rows, columns;  // of the window in the map
  int64_t first, last;               // image rows of its queries
  int64_t keys() const { return rows * columns; }
  int64_t queries() const { return (last - first) * columns; }
};

struct Plan {
  const RelativeAttention& a;
  int64_t batch, heads, d, across, windows, parts;
  int64_t keys, width;  // of the largest window; of a row of logits

  Plan(const Tensor4& q, const RelativeAttention& attention, int64_t tasks) : a(attention) {
    batch = q.size[0], heads = q.size[1], d = q.size[3];
    across = ceil_div(a.width, a.window_width);
    windows = across * ceil_div(a.height, a.window_height);
    keys = min64(a.height, a.window_height) * min64(a.width, a.window_width);
    width = padded(keys);
    const int64_t rows = min64(a.height, a.window_height);
    parts = clamp64(ceil_div(tasks, max64(batch * heads * windows, 1)), 1, ceil_div(keys, kLeastQueries));
    parts = min64(parts, rows);
  }
  int64_t tasks() const { return batch * heads * windows * parts; }
  int64_t table_width() const { return 2 * a.window_width - 1; }
  int64_t table_size() const { return (2 * a.window_height - 1) * table_width(); }
  // Of one panel, [block][token][lane] or [block of tokens][channel][lane].
  int64_t panel() const { return width * padded(d); }
  int64_t work(int64_t products) const { return batch * heads * windows * keys * keys * (products * d + 16); }

  // Tasks of a head lie together: [head][sample][window][part].
  Task task(int64_t i) const {
    Task t;
    t.part = i % parts, i /= parts;
    t.window = i % windows, i /= windows;
    t.sample = i % batch, t.head = i / batch;
    t.top = t.window / across * a.window_height, t.left = t.window % across * a.window_width;
    t.rows = min64(a.window_height, a.height - t.top), t.columns = min64(a.window_width, a.width - t.left);
    t.first = t.part * t.rows / parts, t.last = (t.part + 1) * t.rows / parts;
    return t;
  }
  // The window as an image of d channels.
  Tensor4 image(const Tensor4& t, const Task& of) const {
    const int64_t token = of.top * a.width + of.left;
    const int64_t offset = of.sample * t.stride[0] + of.head * t.stride[1] + token * t.stride[2];
    return {(char*)t.data + offset * size_of(t.dtype),
            t.dtype,
            {1, d, of.rows, of.columns},
            {0, t.stride[3], a.width * t.stride[2], t.stride[2]}};
  }
  template <class A>
  void pack(const Tensor4& t, const Task& of, int64_t first, int64_t last, A* panel) const {
    const int64_t count = (last - first) * of.columns;
    pack_rows(image(t, of), 0, {0, d}, first, last, panel, width * kLanes);
    for (int64_t b = 0; b < blocks_of(d) && count < width; b++) {
      memset(panel + (b * width + count) * kLanes, 0, (width - count) * kLanes * sizeof(A));
    }
  }
  template <class A>
  void unpack(const A* panel, const Tensor4& t, const Task& of, int64_t first, int64_t last) const {
    unpack_rows(panel, width * kLanes, image(t, of), 0, {0, d}, first, last);
  }
  // [block of tokens][channel][lane] of [block of channels][token][lane].
  template <class A>
  void turn(const A* panel, A* turned) const {
    for (int64_t b = 0; b < blocks_of(d); b++) {
      const Tensor4 channels = {(void*)(panel + b * width * kLanes),
                                sizeof(A) == sizeof(double) ? kFloat64 : kFloat32,
                                {1, width, 1, kLanes},
                                {0, kLanes, 0, 1}};
      pack_rows(channels, 0, {0, width}, 0, 1, turned + b * kLanes * kLanes, padded(d) * kLanes);
    }
  }
};

}  // namespace VOPS_ISA
}  // namespace vops
