// Passes over pixels, whose channels are neighbours in memory: a moved map is read where it comes from. A quarter of
// the channels has one such place in each branch.
#include "pointwise.h"
#include "shift_split.h"

namespace vops {
namespace VOPS_ISA {

extern const PointwiseOps pointwise_ops;

namespace {

constexpr int64_t kElementWork = 4;  // in multiply-adds, for for_each_task

template <class T>
struct Map {
  T* data;
  int64_t image, row, column;
  explicit Map(const Tensor4& t) : data((T*)t.data), image(t.stride[0]), row(t.stride[2]), column(t.stride[3]) {}
  T* at(int64_t n, int64_t i, int64_t j) const { return data + n * image + i * row + j * column; }
};

// The pixel that comes to (i, j) in a branch; what would come from outside is what was there.
template <class T>
VOPS_INLINE T* source(const Map<T>& map, const Tensor4& t, const Quarter& q, int branch, int64_t n, int64_t i,
                      int64_t j) {
  if (q.vertical[branch]) return map.at(n, clamp64(i + q.step, 0, t.size[2] - 1), j);
  return map.at(n, i, clamp64(j + q.step, 0, t.size[3] - 1));
}

// Calls body(n, i, scratch) for all rows of all images. What a body reads for every pixel it makes itself: what it
// refers to would be loaded again after every store.
template <class A, class Body>
VOPS_INLINE Error for_each_row(const Tensor4& t, int64_t scratch, const Body& body) {
  const int64_t height = t.size[2], rows = t.size[0] * height, tasks = min64(rows, tasks_for_threads());
  const int64_t work = rows * t.size[3] * t.size[1] * kElementWork;
  return for_each_task<A>(tasks, work, scratch, [&](int64_t task, A* memory) {
    for (int64_t r = task * rows / tasks; r < (task + 1) * rows / tasks; r++) body(r / height, r % height, memory);
  });
}

// Sums over the pixels of an image, in shares of its rows that depend on its shape only: many enough for the threads,
// short enough for float32.
constexpr int64_t kSharePixels = 128, kMostShares = 16;

template <class A, class Body>
VOPS_INLINE Error sum_images(const Tensor4& map, const Tensor4& out, const Body& body) {
  const int64_t images = map.size[0], height = map.size[2], width = map.size[3], length = out.size[1] * out.size[3];
  const int64_t rows = max64(ceil_div(kSharePixels, width), ceil_div(height, kMostShares));
  const int64_t shares = ceil_div(height, rows), work = images * height * width * map.size[1] * kElementWork;
  const int64_t bytes = images * shares * padded(length) * sizeof(A);
  const PartialSums<A> sums = {(A*)thread_scratch(kSums, bytes), shares, blocks_of(length)};
  if (!sums.data) return kOutOfMemory;
  Error error = for_each_task<A>(images * shares, work, 0, [&](int64_t task, A*) {
    const int64_t n = task / shares, share = task % shares;
    A* own = sums.panel(n, share);
    memset(own, 0, padded(length) * sizeof(A));
    for (int64_t i = share * rows; i < min64(height, (share + 1) * rows); i++) body(n, i, own);
  });
  if (error) return error;
  return for_each_task<A>(images, images * shares * length, 0,
                          [&](int64_t n, A*) { memcpy(small<A>(out, n), sums.total(n), length * sizeof(A)); });
}

// Calls f(number of pixels, first of them) for the pixels of a row: several share the trip of their sums through
// memory.
template <class F>
VOPS_INLINE void for_each_pixels(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + 4 <= width; j += 4) f(Constant<4>(), j);
  for (; j < width; j++) f(Constant<1>(), j);
}

template <class T, class A>
VOPS_INLINE void add_pixels(const Map<const T>& map, int64_t n, int64_t i, int64_t width, int64_t channels, A sign,
                            A* sums) {
  for_each_pixels(width, [&](auto count, int64_t j) {
    constexpr int kPixels = decltype(count)::value;
    const T* p[kPixels];
    for (int k = 0; k < kPixels; k++) p[k] = map.at(n, i, j + k);
    for_each_vector(0, channels, [&](int64_t c, const auto& get, const auto& put) {
      Vec<A> sum = get(p[0] + c);
      for (int k = 1; k < kPixels; k++) sum += get(p[k] + c);
      put(sums + c, get(sums + c) + sum * sign);
    });
  });
}

Error edge_sums(const Tensor4& map, const Tensor4& sums) {
  return with_type(map.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
    return sum_images<A>(map, sums, [&](int64_t n, int64_t i, A* own) {
      const Map<const T> from(map);
      const int64_t channels = map.size[1], height = map.size[2], width = map.size[3];
      A *vertical = own + channels, *horizontal = vertical + channels;
      add_pixels<T, A>(from, n, i, width, channels, 1, own);
      // The same row twice would leave its rounding error.
      if (i == 0 && height > 1) add_pixels<T, A>(from, n, i, width, channels, 1, vertical);
      if (i == height - 1 && height > 1) add_pixels<T, A>(from, n, i, width, channels, -1, vertical);
      const T *first = from.at(n, i, 0), *last = from.at(n, i, width - 1);
      for_each_vector(0, channels, [&](int64_t c, const auto& get, const auto& put) {
        put(horizontal + c, get(horizontal + c) + (get(first + c) - get(last + c)));
      });
    });
  });
}

Error weigh(const Tensor4& x, const Tensor4& weights, const Tensor4& offset, const Tensor4& y) {
  return with_type(x.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
    return for_each_row<A>(y, y.size[1], [&](int64_t n, int64_t i, A* zeros) {
      const Map<const T> from(x);
      const Map<T> to(y);
      const int64_t channels = y.size[1], width = y.size[3];
      const A* w = small<A>(weights, n);
      const A* b = offset.data ? small<A>(offset, n) : (A*)memset(zeros, 0, channels * sizeof(A));
      for (int64_t j = 0; j < width; j++) {
        const T* p3 = from.at(n, i, j) + 2 * channels;
        T* py = to.at(n, i, j);
        for (int k = 0; k < 4; k++) {
          const Quarter q = quarter(channels, k);
          const T *p1 = source(from, x, q, 0, n, i, j), *p2 = source(from, x, q, 1, n, i, j) + channels;
          for_each_vector(q.begin, q.end, [&](int64_t c, const auto& get, const auto& put) {
            Vec<A> sum = get(b + c) + get(w + c) * get(p1 + c);
            sum += get(w + channels + c) * get(p2 + c);
            put(py + c, sum + get(w + 2 * channels + c) * get(p3 + c));
          });
        }
      }
    });
  });
}

Tensor4 some_images(Tensor4 t, int64_t first, int64_t count) {
  t.data = (char*)t.data + first * t.stride[0] * (int64_t)sizeof(float);
  t.size[0] = count;
  return t;
}

Error linear_weigh_linear(const LinearWeighLinear& t, const Tensor4& y) {
  const PointwiseOps& linear = pointwise_ops;
  const int64_t images = y.size[0], channels = y.size[1], at_a_time = t.weighed.size[0];
  const int64_t size = linear.packed_size(3 * channels, channels);
  float* mlp1 = (float*)thread_scratch(kSums, (size + linear.packed_size(channels, channels)) * (int64_t)sizeof(float));
  if (!mlp1) return kOutOfMemory;
  float* mlp2 = mlp1 + size;
  Error error = linear.pack(t.mlp1, {}, mlp1);
  if (!error) error = linear.pack(t.mlp2, t.bias, mlp2);
  for (int64_t n = 0; !error && n < images; n += at_a_time) {
    const int64_t count = min64(at_a_time, images - n);
    const Tensor4 branches = some_images(t.branches, t.branches.size[0] == images ? n : 0, count);
    const Tensor4 weighed = some_images(t.weighed, 0, count);
    error = linear.forward_packed(some_images(t.x, n, count), mlp1, branches);
    if (!error) error = weigh(branches, some_images(t.weights, n, count), some_images(t.offset, n, count), weighed);
    if (!error) error = linear.forward_packed(weighed, mlp2, some_images(y, n, count));
  }
  return error;
}

template <bool with_y, int kPixels, class T, class A>
VOPS_INLINE void add_products(const T* const (&g)[kPixels], const T* const (&p)[3][kPixels], const A* w, const A* b,
                              int64_t channels, const Quarter& q, A* sums, T* const (&y)[kPixels]) {
  for_each_vector(q.begin, q.end, [&](int64_t c, const auto& get, const auto& put) {
    Vec<A> sum[4];
    for (int k = 0; k < 4; k++) sum[k] = get(sums + k * channels + c);
    for (int m = 0; m < kPixels; m++) {
      const Vec<A> dy = get(g[m] + c), x1 = get(p[0][m] + c), x2 = get(p[1][m] + c), x3 = get(p[2][m] + c);
      sum[0] += dy * x1;
      sum[1] += dy * x2;
      sum[2] += dy * x3;
      sum[3] += dy;
      if constexpr (with_y) {
        const Vec<A> weighed = get(b + c) + get(w + c) * x1 + get(w + channels + c) * x2;
        put(y[m] + c, weighed + get(w + 2 * channels + c) * x3);
      }
    }
    for (int k = 0; k < 4; k++) put(sums + k * channels + c, sum[k]);
  });
}

template <bool with_y>
Error run_backward_weights(const Tensor4& dy, const Tensor4& x, const Tensor4& weights, const Tensor4& offset,
                           const Tensor4& sums, const Tensor4& y) {
  return with_type(x.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
    return sum_images<A>(dy, sums, [&](int64_t n, int64_t i, A* own) {
      const Map<const T> grads(dy), from(x);
      const Map<T> to(y);
      const int64_t channels = dy.size[1];
      for_each_pixels(dy.size[3], [&](auto count, int64_t j) {
        constexpr int kPixels = decltype(count)::value;
        const T *g[kPixels], *p[3][kPixels];
        T* py[kPixels];
        for (int m = 0; m < kPixels; m++) {
          g[m] = grads.at(n, i, j + m);
          p[2][m] = from.at(n, i, j + m) + 2 * channels;
          py[m] = with_y ? to.at(n, i, j + m) : nullptr;
        }
        for (int k = 0; k < 4; k++) {
          const Quarter q = quarter(channels, k);
          for (int m = 0; m < kPixels; m++) {
            p[0][m] = source(from, x, q, 0, n, i, j + m);
            p[1][m] = source(from, x, q, 1, n, i, j + m) + channels;
          }
          add_products<with_y>(g, p, small<A>(weights, n), with_y ? small<A>(offset, n) : nullptr, channels, q, own,
                               py);
        }
      });
    });
  });
}

Error weigh_backward_weights(const Tensor4& dy, const Tensor4& x, const Tensor4& weights, const Tensor4& offset,
                             const Tensor4& sums, const Tensor4& y) {
  return (y.data ? run_backward_weights<true> : run_backward_weights<false>)(dy, x, weights, offset, sums, y);
}

// The pixels that took what is at position i of an axis: none, one or two.
struct Takers {
  int64_t count, at[2];
};
VOPS_INLINE Takers takers(int64_t i, int64_t size, int step) {
  const int64_t moved = i - step, stayed = step < 0 ? 0 : size - 1;
  Takers found = {0, {0, 0}};
  if (moved >= 0 && moved < size) found.at[found.count++] = moved;
  if (i == stayed) found.at[found.count++] = stayed;
  return found;
}

// Where none or two pixels may have taken a value; the channels of `zeros` stand in for what is not there.
template <class T, class A>
VOPS_INLINE void spread_border_pixel(const Map<const T>& grads, const Tensor4& dy, const A* w, const A* dpooled,
                                     const T* zeros, int64_t n, int64_t i, int64_t j, T* dx) {
  const int64_t channels = dy.size[1];
  for (int k = 0; k < 4; k++) {
    const Quarter q = quarter(channels, k);
    for (int branch = 0; branch < 2; branch++) {
      const bool vertical = q.vertical[branch];
      const Takers t = vertical ? takers(i, dy.size[2], q.step) : takers(j, dy.size[3], q.step);
      const T* g[2] = {zeros, zeros};
      for (int64_t m = 0; m < t.count; m++) g[m] = vertical ? grads.at(n, t.at[m], j) : grads.at(n, i, t.at[m]);
      const A count = (A)t.count;
      for_each_vector(q.begin, q.end, [&](int64_t c, const auto& get, const auto& put) {
        const Vec<A> sum = get(g[0] + c) + get(g[1] + c);
        put(dx + branch * channels + c, get(w + branch * channels + c) * sum + get(dpooled + c) * count);
      });
    }
  }
  const T* g = grads.at(n, i, j);
  for_each_vector(0, channels, [&](int64_t c, const auto& get, const auto& put) {
    put(dx + 2 * channels + c, get(w + 2 * channels + c) * get(g + c) + get(dpooled + c));
  });
}

template <class T, class A>
VOPS_INLINE void spread_pixel(const Map<const T>& grads, int64_t channels, const A* w, const A* dpooled, int64_t n,
                              int64_t i, int64_t j, T* dx) {
  const T* g3 = grads.at(n, i, j);
  for (int k = 0; k < 4; k++) {
    const Quarter q = quarter(channels, k);
    const int64_t rows[2] = {q.vertical[0] ? q.step : 0, q.vertical[1] ? q.step : 0};
    const T* g1 = grads.at(n, i - rows[0], j - (q.step - rows[0]));
    const T* g2 = grads.at(n, i - rows[1], j - (q.step - rows[1]));
    for_each_vector(q.begin, q.end, [&](int64_t c, const auto& get, const auto& put) {
      const Vec<A> d = get(dpooled + c);
      put(dx + c, get(w + c) * get(g1 + c) + d);
      put(dx + channels + c, get(w + channels + c) * get(g2 + c) + d);
      put(dx + 2 * channels + c, get(w + 2 * channels + c) * get(g3 + c) + d);
    });
  }
}

Error weigh_backward_input(const Tensor4& dy, const Tensor4& weights, const Tensor4& dpooled, const Tensor4& dx) {
  return with_type(dy.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
    return for_each_row<A>(dx, dy.size[1], [&](int64_t n, int64_t i, A* zeros) {
      const Map<const T> grads(dy);
      const Map<T> to(dx);
      const int64_t channels = dy.size[1], height = dy.size[2], width = dy.size[3];
      const A *w = small<A>(weights, n), *d = small<A>(dpooled, n);
      memset(zeros, 0, channels * sizeof(A));
      for (int64_t j = 0; j < width; j++) {
        T* to_pixel = to.at(n, i, j);
        if (i == 0 || i == height - 1 || j == 0 || j == width - 1) {
          spread_border_pixel<T, A>(grads, dy, w, d, (const T*)zeros, n, i, j, to_pixel);
        } else {
          spread_pixel<T, A>(grads, channels, w, d, n, i, j, to_pixel);
        }
      }
    });
  });
}

}  // namespace

extern const ShiftSplitAttentionOps shift_split_attention_ops;
const ShiftSplitAttentionOps shift_split_attention_ops = {edge_sums,
                                                          pool,
                                                          pool_linear,
                                                          branch_weights,
                                                          branch_weights_backward,
                                                          weigh,
                                                          linear_weigh_linear,
                                                          weigh_backward_weights,
                                                          weigh_backward_input};

}  // namespace VOPS_ISA
}  // namespace vops
