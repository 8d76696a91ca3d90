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

// The same where images stay apart, as each has numbers of its own.
template <class... Tensors>
VOPS_INLINE Error find_image_lines(Lines* lines, const Tensor4& first, const Tensors&... rest) {
  if (Error error = find_lines(lines, first, rest...)) return error;
  if (!lines->planes) *lines = {false, first.size[0], first.size[2] * first.size[3], first.size[1]};
  return nullptr;
}

template <bool flag>
using Flag = Constant<flag>;
// Calls f(type, whether lines are planes) with the storage type of a tensor whose sums have the type A. float64 is
// there for exactness: it is compiled once for both.
template <class A, class F>
VOPS_INLINE void with_types(int dtype, bool planes, const F& f) {
  with_type_of_sums<A>(dtype, [&](auto type) {
    if constexpr (sizeof(A) == sizeof(double)) {
      f(type, Flag<false>());
    } else {
      planes ? f(type, Flag<true>()) : f(type, Flag<false>());
    }
  });
}

// The lines of a tensor in one image.
template <class T>
struct Operand {
  T* data;
  int64_t line;
  T* operator[](int64_t i) const { return data + i * line; }
};

// The lines [begin, end) of an image, and which share of its lines they are. Tensors are of type T, sums of type A.
template <class T_, class A_, bool are_planes>
struct Part {
  typedef T_ T;
  typedef A_ A;
  Lines lines;
  int64_t image, begin, end, share;

  bool planes() const { return sizeof(A) == sizeof(double) ? lines.planes : are_planes; }
  // An absent tensor has null lines.
  template <class Type>
  Operand<Type> operand(const Tensor4& t) const {
    if (!t.data) return {nullptr, 0};
    return {(Type*)t.data + image * t.stride[0], lines.planes ? t.stride[1] : pixel_stride(t)};
  }
  Operand<const T> in(const Tensor4& t) const { return operand<const T>(t); }
  Operand<T> out(const Tensor4& t) const { return operand<T>(t); }
};

// Calls f(offset, load, store) for the vectors of a line; the last one may be ragged.
template <class T, class A, bool planes, class F>
VOPS_INLINE void for_each_vector(const Part<T, A, planes>& part, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    for (int64_t i = 0; i < part.lines.length; i += kLanes) {
      const int n = (int)min64(kLanes, part.lines.length - i);
      f(i, [n](const T* p) { return load_n(p, n); }, [n](T* p, Vec<A> v) { store_n(p, v, n); });
    }
  } else {
    for_each_vector(part.lines.length, f);
  }
}

// The value of a channel for the vectors of its line.
template <class T, class A, bool planes>
VOPS_INLINE Vec<A> of_channel(const Part<T, A, planes>& part, const A* values, int64_t line, int64_t offset) {
  return part.planes() ? Vec<A>{} + values[line] : load(values + offset);
}

constexpr int64_t kElementWork = 4;  // in multiply-adds, for for_each_part

VOPS_INLINE int64_t shares_for_threads(const Lines& lines) {
  return clamp64(ceil_div(tasks_for_threads(), max64(lines.images, 1)), 1, max64(lines.per_image, 1));
}
template <class A, bool sees_channels, class Body>
VOPS_INLINE Error for_each_share(const Lines& lines, int dtype, int64_t shares, int64_t work, const Body& body) {
  const int64_t total = lines.count() * lines.length * work;
  return for_each_task<A>(lines.images * shares, total, 0, [&](int64_t task, A*) {
    const int64_t n = task / shares, share = task % shares;
    const int64_t begin = share * lines.per_image / shares, end = (share + 1) * lines.per_image / shares;
    with_types<A>(dtype, sees_channels && lines.planes, [&](auto type, auto planes) {
      body(Part<decltype(type), A, decltype(planes)::value>{lines, n, begin, end, share});
    });
  });
}

// Calls body(part) in tasks that together have all lines, of tensors of one type. `work` is that of an element.
template <class A, class Body>
VOPS_INLINE Error for_each_part(const Lines& lines, int dtype, int64_t work, const Body& body) {
  return for_each_share<A, true>(lines, dtype, shares_for_threads(lines), work, body);
}
// The same for a body that does not ask for channels: what it does to rows and to planes is compiled once.
template <class A, class Body>
VOPS_INLINE Error for_each_part_of_any(const Lines& lines, int dtype, int64_t work, const Body& body) {
  return for_each_share<A, false>(lines, dtype, shares_for_threads(lines), work, body);
}
// The same for a body that adds to the sums of its image and share.
template <class A, class Body>
VOPS_INLINE Error for_each_part(const Lines& lines, int dtype, const PartialSums<A>& sums, int64_t work,
                                const Body& body) {
  const int64_t shares = lines.planes ? shares_for_threads(lines) : sums.splits;
  return for_each_share<A, true>(lines, dtype, shares, work, body);
}

// Rows of whole vectors of channels, zeros at first, in the memory of the calling thread.
template <class A>
struct ChannelRows {
  A* data;
  int64_t step;
  A* operator[](int64_t i) const { return data + i * step; }
};
template <class A>
VOPS_INLINE ChannelRows<A> make_channel_rows(Use use, int64_t channels, int64_t rows) {
  const int64_t bytes = rows * padded(channels) * sizeof(A);
  A* data = (A*)thread_scratch(use, bytes);
  if (data) memset(data, 0, bytes);
  return {data, padded(channels)};
}
template <class A>
VOPS_INLINE ChannelRows<A> make_coefficients(int64_t channels, int64_t rows) {
  return make_channel_rows<A>(kCoefficients, channels, rows);
}

// `count` sums by channel of every image, which is a group. Its splits are shares of its lines; a plane's sums are
// whole, wherever planes are cut.
template <class A>
VOPS_INLINE PartialSums<A> make_sums(const Lines& lines, int64_t channels, int64_t count) {
  const int64_t images = max64(lines.images, 1);
  const int64_t splits = lines.planes ? 1 : clamp64(lines.per_image / 32, 1, ceil_div(kFixedTasks, images));
  const ChannelRows<A> rows = make_channel_rows<A>(kSums, channels, images * splits * count);
  return {rows.data, splits, count * rows.step / kLanes};
}
// The sums over all images, to a vector of channels.
template <class A>
VOPS_INLINE void unpack_sums(const Lines& lines, const PartialSums<A>& sums, const Tensor4& out) {
  unpack_rows<A>(sums.joined(lines.images).total(0), kLanes, out, 0, {0, out.size[1]}, 0, 1);
}
// The sums that a part adds to; those of planes are at [line], those of rows at [offset].
template <class T, class A, bool planes>
VOPS_INLINE A* own_sums(const Part<T, A, planes>& part, const PartialSums<A>& sums) {
  return sums.panel(part.image, part.planes() ? 0 : part.share);
}

// Adds `count` values of a line's channels to their sums, which are padded rows, one after the other: f(offset, load,
// store, values) sets them for a vector.
template <int count, class T, class A, bool planes, class F>
VOPS_INLINE void add_line(const Part<T, A, planes>& part, A* own, int64_t step, int64_t line, const F& f) {
  Vec<A> of_plane[count] = {};
  for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
    Vec<A> values[count];
    f(k, get, put, values);
    for (int c = 0; c < count; c++) {
      A* to = own + c * step + k;
      if (part.planes()) {
        of_plane[c] += values[c];
      } else {
        store(to, load(to) + values[c]);
      }
    }
  });
  for (int c = 0; c < count && part.planes(); c++) own[c * step + line] += sum_of_lanes<A>(of_plane[c]);
}

// Adds the pixels of a tensor to one sum a channel.
template <class A>
VOPS_INLINE Error add_pixels(const Lines& lines, const Tensor4& t, const PartialSums<A>& sums) {
  return for_each_part<A>(lines, t.dtype, sums, kElementWork, [&](auto part) {
    const auto from = part.in(t);
    A* const own = own_sums(part, sums);
    for (int64_t i = part.begin; i < part.end; i++) {
      const auto* p = from[i];
      add_line<1>(part, own, 0, i,
                  [&](int64_t k, const auto& get, const auto&, auto& values) { values[0] = get(p + k); });
    }
  });
}

}  // namespace VOPS_ISA
}  // namespace vops
