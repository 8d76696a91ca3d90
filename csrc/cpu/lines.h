// Elementwise passes over lines: the channels of a pixel where neighbouring channels are neighbours in memory, else the
// pixels of a plane. Either way a line is contiguous, and so channel slices are read and written in place.
#pragma once
#include "parallel.h"

namespace vops {
namespace VOPS_ISA {

struct Lines {
  bool planes;
  int64_t images, per_image, length;
  int64_t count() const { return images * per_image; }
};

VOPS_INLINE int64_t pixel_stride(const Tensor4& t) { return t.size[3] == 1 ? t.stride[2] : t.stride[3]; }
VOPS_INLINE bool is_gapless(const Tensor4& t) {
  return t.size[2] == 1 || t.size[3] == 1 || t.stride[2] == t.size[3] * t.stride[3];
}
VOPS_INLINE bool has_planes(const Tensor4& t) {
  return is_gapless(t) && (pixel_stride(t) == 1 || t.size[2] * t.size[3] == 1);
}

constexpr Error kNoLines = "the tensors have neither their channels nor the pixels of their planes side by side";

// Images that follow each other without a gap in all tensors are one.
template <class... Tensors>
VOPS_INLINE Error find_lines(Lines* lines, const Tensor4& first, const Tensors&... rest) {
  const Tensor4* all[] = {&first, &rest...};
  const int64_t pixels = first.size[2] * first.size[3], channels = first.size[1];
  bool rows = true, planes = true, stacked = true;
  for (const Tensor4* t : all) {
    rows = rows && is_channels_last(*t) && is_gapless(*t);
    planes = planes && has_planes(*t);
    stacked = stacked && t->stride[0] == pixels * pixel_stride(*t);
  }
  if (first.size[0] == 0) rows = true, stacked = false;  // strides of an empty tensor mean nothing
  if (!rows && !planes) return kNoLines;
  if (rows) {
    *lines = {false, first.size[0], pixels, channels};
    if (stacked) *lines = {false, 1, first.size[0] * pixels, channels};
  } else {
    *lines = {true, first.size[0], channels, pixels};
  }
  return nullptr;
}

template <class T>
struct Operand {
  T* data;
  int64_t image, line;
  Operand(const Tensor4& t, const Lines& lines)
      : data((T*)t.data), image(t.stride[0]), line(lines.planes ? t.stride[1] : pixel_stride(t)) {}
  T* at(int64_t image_index, int64_t line_index) const { return data + image_index * image + line_index * line; }
};

// Calls f(image, line in it) for the lines [begin, end).
template <class F>
VOPS_INLINE void for_each_line(const Lines& lines, int64_t begin, int64_t end, const F& f) {
  int64_t n = begin / lines.per_image, i = begin % lines.per_image;
  for (int64_t left = end - begin; left > 0; left--) {
    f(n, i);
    if (++i == lines.per_image) i = 0, n++;
  }
}

// Calls f(offset, load, store) for the vectors of a line; the last one may be ragged.
template <class F>
VOPS_INLINE void for_each_vector(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    f(i, [](const auto* p) { return load(p); }, [](auto* p, auto v) { store(p, v); });
  }
  const int n = (int)(length - i);
  if (n > 0) {
    f(i, [n](const auto* p) { return load_n(p, n); }, [n](auto* p, auto v) { store_n(p, v, n); });
  }
}

// The value of a channel for the vectors of its line.
template <class A, bool planes>
VOPS_INLINE Vec<A> of_channel(const A* values, int64_t line, int64_t offset) {
  if constexpr (planes) return Vec<A>{} + values[line];
  if constexpr (!planes) return load(values + offset);
}

template <class A>
VOPS_INLINE A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int k = 0; k < kLanes; k++) sum += v[k];
  return sum;
}

template <bool flag>
struct Flag {
  static constexpr bool value = flag;
};

// Calls f(type, whether lines are planes) with the storage type of a tensor whose sums have the type A.
template <class A, class F>
VOPS_INLINE void with_types(int dtype, bool planes, const F& f) {
  auto with_type = [&](auto type) { planes ? f(type, Flag<true>()) : f(type, Flag<false>()); };
  if constexpr (sizeof(A) == sizeof(double)) {
    with_type(double());
  } else {
    if (dtype == kFloat32) with_type(float());
    if (dtype == kBFloat16) with_type(bf16());
    if (dtype == kFloat16) with_type(f16());
  }
}

constexpr int64_t kElementWork = 4;  // in multiply-adds, for for_each_task
VOPS_INLINE int64_t padded(int64_t channels) { return ceil_div(channels, kLanes) * kLanes; }

// Partial sums by channel: of a plane, or, of rows, of a share of them that depends on the shape only.
template <class A>
struct PartialSums {
  A* data;
  int64_t count, step;
  A* part(int64_t i) const { return data + i * step; }
  void total(const Tensor4& out) const {
    for (int64_t i = 1; i < count; i++) add_panel(data, part(i), step / kLanes);
    unpack_rows<A>(data, kLanes, out, 0, {0, out.size[1]}, 0, 1);
  }
};
template <class A>
VOPS_INLINE PartialSums<A> make_sums(const Lines& lines, int64_t channels) {
  const int64_t count = lines.planes ? max64(lines.images, 1) : clamp64(lines.count() / 64, 1, kFixedTasks);
  const int64_t step = padded(channels), bytes = count * step * sizeof(A);
  A* data = (A*)thread_scratch(kSums, bytes);
  if (data) memset(data, 0, bytes);
  return {data, count, step};
}

// Calls body(part of the sums, first line, last line, scratch) in tasks: a plane adds to a channel of its own, so
// planes may be cut anywhere.
template <class A, class Body>
VOPS_INLINE Error for_each_share(const Lines& lines, const PartialSums<A>& sums, int64_t scratch, const Body& body) {
  const int64_t count = lines.count(), tasks = lines.planes ? min64(count, tasks_for_threads()) : sums.count;
  return for_each_task<A>(tasks, count * lines.length * kElementWork, scratch, [&](int64_t task, A* memory) {
    body(sums.part(lines.planes ? 0 : task), task * count / tasks, (task + 1) * count / tasks, memory);
  });
}

// Adds the vectors that f(offset, load, store) returns for a line to its channels' sums.
template <class A, bool planes, class F>
VOPS_INLINE void sum_line(int64_t length, A* sums, const F& f) {
  Vec<A> sum = {};
  for_each_vector(length, [&](int64_t k, const auto& get, const auto& put) {
    const Vec<A> v = f(k, get, put);
    if constexpr (planes) sum += v;
    if constexpr (!planes) store(sums + k, load(sums + k) + v);
  });
  if constexpr (planes) *sums += sum_of_lanes<A>(sum);
}

}  // namespace VOPS_ISA
}  // namespace vops
