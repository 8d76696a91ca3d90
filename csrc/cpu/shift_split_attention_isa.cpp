// Passes over pixels, whose channels are neighbours in memory: a moved map is read where it comes from. A quarter of
// the channels has one such place in each branch.
#include "parallel.h"
#include "pointwise.h"
#include "shift_split_attention.h"

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

// Image n of a small tensor (N, K, 1, C).
template <class A>
VOPS_INLINE A* small(const Tensor4& t, int64_t n) {
  return (A*)t.data + n * t.size[1] * t.size[3];
}

// Calls f(type, type of its sums).
template <class F>
VOPS_INLINE Error with_types(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32:
      return f(float(), float());
    case kBFloat16:
      return f(bf16(), float());
    case kFloat16:
      return f(f16(), float());
    default:
      return f(double(), double());
  }
}

// Calls f(channel, load, store) for the vectors of channels [begin, end); the last one may be ragged.
template <class F>
VOPS_INLINE void for_each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    f(c, [](const auto* p) { return load(p); }, [](auto* p, auto v) { store(p, v); });
  }
  const int n = (int)(end - c);
  if (n > 0) {
    f(c, [n](const auto* p) { return load_n(p, n); }, [n](auto* p, auto v) { store_n(p, v, n); });
  }
}

// Channels [begin, end) of a branch, and how far away a pixel of branch 1 or 2 comes from, along one axis.
struct Quarter {
  int64_t begin, end;
  int step;
  bool vertical[2];
};
VOPS_INLINE Quarter quarter(int64_t channels, int64_t q) {
  const bool first = q < 2;
  return {channels * q / 4, channels * (q + 1) / 4, q % 2 ? 1 : -1, {first, !first}};
}

// The pixel that comes to (i, j) in a branch; what would come from outside is what was there.
template <class T>
VOPS_INLINE T* source(const Map<T>& map, const Tensor4& t, const Quarter& q, int branch, int64_t n, int64_t i,
                      int64_t j) {
  if (q.vertical[branch]) return map.at(n, clamp64(i + q.step, 0, t.size[2] - 1), j);
  return map.at(n, i, clamp64(j + q.step, 0, t.size[3] - 1));
}

// Calls body(n, i, scratch) for all rows of all images.
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
VOPS_INLINE Error sum_images(const Tensor4& map, const Tensor4& sums, const Body& body) {
  const int64_t images = map.size[0], height = map.size[2], width = map.size[3], length = sums.size[1] * sums.size[3];
  const int64_t rows = max64(ceil_div(kSharePixels, width), ceil_div(height, kMostShares));
  const int64_t shares = ceil_div(height, rows), work = images * height * width * map.size[1] * kElementWork;
  A* partial = (A*)thread_scratch(kSums, images * shares * length * sizeof(A) + 1);
  if (!partial) return kOutOfMemory;
  Error error = for_each_task<A>(images * shares, work, 1, [&](int64_t task, A*) {
    const int64_t n = task / shares, share = task % shares;
    A* own = partial + task * length;
    memset(own, 0, length * sizeof(A));
    for (int64_t i = share * rows; i < min64(height, (share + 1) * rows); i++) body(n, i, own);
  });
  if (error) return error;
  return for_each_task<A>(images, images * shares * length, 1, [&](int64_t n, A*) {
    A* total = small<A>(sums, n);
    const A* from = partial + n * shares * length;
    for_each_vector(0, length, [&](int64_t c, const auto& get, const auto& put) {
      auto sum = get(from + c);
      for (int64_t share = 1; share < shares; share++) sum += get(from + share * length + c);
      put(total + c, sum);
    });
  });
}

// Calls f(number of pixels, first of them) for the pixels of a row: several share the trip of their sums through
// memory.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class F>
VOPS_INLINE void for_each_pixels(int64_t width, const F& f) {
  int64_t j = 0;
  for (; j + 4 <= width; j += 4) f(Count<4>(), j);
  for (; j < width; j++) f(Count<1>(), j);
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
  return with_types(map.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const Map<const T> from(map);
    const int64_t channels = map.size[1], height = map.size[2], width = map.size[3];
    return sum_images<A>(map, sums, [&](int64_t n, int64_t i, A* own) {
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

Error pool(const Tensor4& sums, const Tensor4& pooled) {
  return with_types(sums.dtype, [&](auto, auto sum_type) {
    typedef decltype(sum_type) A;
    const int64_t channels = pooled.size[3];
    for (int64_t n = 0; n < pooled.size[0]; n++) {
      A* to = small<A>(pooled, n);
      const A* total = small<A>(sums, n);
      for (int64_t k = 0; k < 4; k++) {
        const Quarter q = quarter(channels, k);
        const A* along = total + (q.vertical[0] ? 1 : 2) * 3 * channels;
        const A* across = total + (q.vertical[1] ? 1 : 2) * 3 * channels + channels;
        const A sign = -(A)q.step;
        for_each_vector(q.begin, q.end, [&](int64_t c, const auto& get, const auto& put) {
          const Vec<A> all = get(total + c) + get(total + channels + c) + get(total + 2 * channels + c);
          put(to + c, all + (get(along + c) + get(across + c)) * sign);
        });
      }
    }
    return Error();
  });
}

// Of images that share the reads of a matrix.
constexpr int kImages = 4;
constexpr int64_t kMatrixRows = 32, kMatrixColumns = 4 * kLanes, kSumRows = 128;  // of a task, of a task, of a sum

// out (N, O) = in (N, I) times the transpose of the matrix (O, I).
Error multiply(const Tensor4& matrix, const void* in, int64_t images, void* out) {
  return with_types(matrix.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const int64_t rows = matrix.size[2], depth = matrix.size[3], tasks = ceil_div(rows, kMatrixRows);
    return for_each_task<A>(tasks, images * rows * depth, 0, [&](int64_t task, A*) {
      for (int64_t r = task * kMatrixRows; r < min64(rows, (task + 1) * kMatrixRows); r++) {
        const T* w = (const T*)matrix.data + r * matrix.stride[2];
        for (int64_t n = 0; n < images; n += kImages) {
          const A* p[kImages];
          for (int i = 0; i < kImages; i++) p[i] = (const A*)in + min64(n + i, images - 1) * depth;
          Vec<A> sum[kImages] = {};
          for_each_vector(0, depth, [&](int64_t c, const auto& get, const auto&) {
            const Vec<A> v = get(w + c);
            for (int i = 0; i < kImages; i++) sum[i] += v * get(p[i] + c);
          });
          for (int i = 0; i < min64(kImages, images - n); i++) ((A*)out)[(n + i) * rows + r] = sum_of_lanes(sum[i]);
        }
      }
    });
  });
}

// din (N, I) = dout (N, O) times the matrix, whose own gradient may be absent.
Error multiply_backward(const void* dout, const Tensor4& matrix, const void* in, int64_t images, const Tensor4& dmatrix,
                        void* din) {
  return with_types(matrix.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const int64_t rows = matrix.size[2], depth = matrix.size[3], tasks = ceil_div(depth, kMatrixColumns);
    return for_each_task<A>(tasks, 2 * images * rows * depth, 0, [&](int64_t task, A*) {
      const int64_t begin = task * kMatrixColumns, end = min64(depth, begin + kMatrixColumns);
      for (int64_t n = 0; n < images; n++) memset((A*)din + n * depth + begin, 0, (end - begin) * sizeof(A));
      for (int64_t first = 0; first < rows; first += kSumRows) {
        for (int64_t n = 0; n < images; n += kImages) {
          const A* g[kImages];
          for (int i = 0; i < kImages; i++) g[i] = (const A*)dout + min64(n + i, images - 1) * rows;
          for_each_vector(begin, end, [&](int64_t c, const auto& get, const auto& put) {
            Vec<A> sum[kImages] = {};
            for (int64_t r = first; r < min64(rows, first + kSumRows); r++) {
              const Vec<A> v = get((const T*)matrix.data + r * matrix.stride[2] + c);
              for (int i = 0; i < kImages; i++) sum[i] += v * g[i][r];
            }
            for (int i = 0; i < min64(kImages, images - n); i++) {
              A* to = (A*)din + (n + i) * depth + c;
              put(to, get((const A*)to) + sum[i]);
            }
          });
        }
      }
      for (int64_t r = 0; dmatrix.data && r < rows; r++) {
        for_each_vector(begin, end, [&](int64_t c, const auto& get, const auto& put) {
          Vec<A> sum = {};
          for (int64_t n = 0; n < images; n++)
            sum += get((const A*)in + n * depth + c) * ((const A*)dout)[n * rows + r];
          put((T*)dmatrix.data + r * dmatrix.stride[2] + c, sum);
        });
      }
    });
  });
}

// What is summed over the pixels goes through a linear layer as they do. A moved branch has, for each quarter of its
// channels, one sum of x for an input.
Error pool_linear(const Tensor4& sums, const Tensor4& mlp1, const Tensor4& b, int64_t pixels, const Tensor4& pooled) {
  return with_types(mlp1.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const int64_t images = pooled.size[0], channels = pooled.size[3], tasks = ceil_div(channels, kMatrixRows);
    const int64_t length = 5 * channels;
    A* inputs = (A*)thread_scratch(kSums, images * length * sizeof(A) + 1);
    if (!inputs) return kOutOfMemory;
    for (int64_t n = 0; n < images; n++) {
      const A *total = small<A>(sums, n), *vertical = total + channels, *horizontal = vertical + channels;
      for_each_vector(0, channels, [&](int64_t c, const auto& get, const auto& put) {
        A* to = inputs + n * length + c;
        put(to, get(total + c) + get(vertical + c));
        put(to + channels, get(total + c) - get(vertical + c));
        put(to + 2 * channels, get(total + c) + get(horizontal + c));
        put(to + 3 * channels, get(total + c) - get(horizontal + c));
        put(to + 4 * channels, get(total + c));
      });
    }
    return for_each_task<A>(tasks, 3 * images * channels * channels, 0, [&](int64_t task, A*) {
      const int64_t begin = task * kMatrixRows, end = min64(channels, begin + kMatrixRows);
      for (int64_t k = 0; k < 4; k++) {
        const Quarter q = quarter(channels, k);
        const int64_t along = (q.vertical[0] ? 0 : 2) + (q.step > 0), across = (q.vertical[1] ? 0 : 2) + (q.step > 0);
        for (int64_t c = max64(begin, q.begin); c < min64(end, q.end); c++) {
          const T* w = (const T*)mlp1.data + c * mlp1.stride[2];
          const T *w2 = w + channels * mlp1.stride[2], *w3 = w2 + channels * mlp1.stride[2];
          A bias = 0;
          for (int64_t branch = 0; b.data && branch < 3; branch++) bias += ((const A*)b.data)[branch * channels + c];
          for (int64_t n = 0; n < images; n++) {
            const A* in = inputs + n * length;
            Vec<A> sum = {};
            for_each_vector(0, channels, [&](int64_t i, const auto& get, const auto&) {
              sum += get(w + i) * get(in + along * channels + i) + get(w2 + i) * get(in + across * channels + i) +
                     get(w3 + i) * get(in + 4 * channels + i);
            });
            small<A>(pooled, n)[c] = sum_of_lanes(sum) + bias * pixels;
          }
        }
      }
    });
  });
}

Error branch_weights(const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2, const Tensor4& hidden,
                     const Tensor4& weights) {
  return with_types(pooled.dtype, [&](auto, auto sum_type) {
    typedef decltype(sum_type) A;
    const int64_t images = pooled.size[0], channels = pooled.size[3], width = images * hidden.size[3];
    A* activated = (A*)thread_scratch(kSums, width * sizeof(A) + 1);
    if (!activated) return kOutOfMemory;
    Error error = multiply(mlp1, pooled.data, images, hidden.data);
    if (error) return error;
    for_each_vector(0, width, [&](int64_t c, const auto& get, const auto& put) {
      put(activated + c, gelu(get((const A*)hidden.data + c)));
    });
    error = multiply(mlp2, activated, images, weights.data);
    for (int64_t n = 0; n < images; n++) {
      A* w = small<A>(weights, n);
      for_each_vector(0, channels, [&](int64_t c, const auto& get, const auto& put) {
        Vec<A> v[3], most;
        for (int k = 0; k < 3; k++) v[k] = get(w + k * channels + c);
        most = v[0] > v[1] ? v[0] : v[1];
        most = most > v[2] ? most : v[2];
        for (int k = 0; k < 3; k++) v[k] = exp(v[k] - most);
        const Vec<A> inverse = 1 / (v[0] + v[1] + v[2]);
        for (int k = 0; k < 3; k++) put(w + k * channels + c, v[k] * inverse);
      });
    }
    return error;
  });
}

Error branch_weights_backward(const Tensor4& dweights, const Tensor4& weights, const Tensor4& hidden,
                              const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2, const Tensor4& dmlp1,
                              const Tensor4& dmlp2, const Tensor4& dpooled) {
  return with_types(pooled.dtype, [&](auto, auto sum_type) {
    typedef decltype(sum_type) A;
    const int64_t images = pooled.size[0], channels = pooled.size[3], width = images * hidden.size[3];
    A* dlogits = (A*)thread_scratch(kSums, (images * 3 * channels + 2 * width) * sizeof(A) + 1);
    if (!dlogits) return kOutOfMemory;
    A *activated = dlogits + images * 3 * channels, *dhidden = activated + width;
    for (int64_t n = 0; n < images; n++) {
      const A *w = small<A>(weights, n), *dw = small<A>(dweights, n);
      A* to = dlogits + n * 3 * channels;
      for_each_vector(0, channels, [&](int64_t c, const auto& get, const auto& put) {
        Vec<A> product[3], sum = {};
        for (int k = 0; k < 3; k++) {
          product[k] = get(w + k * channels + c) * get(dw + k * channels + c);
          sum += product[k];
        }
        for (int k = 0; k < 3; k++) put(to + k * channels + c, product[k] - get(w + k * channels + c) * sum);
      });
    }
    for_each_vector(0, width, [&](int64_t c, const auto& get, const auto& put) {
      put(activated + c, gelu(get((const A*)hidden.data + c)));
    });
    const Error error = multiply_backward(dlogits, mlp2, activated, images, dmlp2, dhidden);
    if (error) return error;
    for_each_vector(0, width, [&](int64_t c, const auto& get, const auto& put) {
      put(dhidden + c, get(dhidden + c) * gelu_grad(get((const A*)hidden.data + c)));
    });
    return multiply_backward(dhidden, mlp1, pooled.data, images, dmlp1, dpooled.data);
  });
}

Error weigh(const Tensor4& x, const Tensor4& weights, const Tensor4& offset, const Tensor4& y) {
  return with_types(x.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const Map<const T> from(x);
    const Map<T> to(y);
    const int64_t channels = y.size[1];
    return for_each_row<A>(y, channels, [&](int64_t n, int64_t i, A* zeros) {
      const A* w = small<A>(weights, n);
      const A* b = offset.data ? small<A>(offset, n) : (A*)memset(zeros, 0, channels * sizeof(A));
      for (int64_t j = 0; j < y.size[3]; j++) {
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
  return with_types(x.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const Map<const T> grads(dy), from(x);
    const Map<T> to(y);
    const int64_t channels = dy.size[1];
    return sum_images<A>(dy, sums, [&](int64_t n, int64_t i, A* own) {
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
  return with_types(dy.dtype, [&](auto type, auto sum_type) {
    typedef decltype(type) T;
    typedef decltype(sum_type) A;
    const Map<const T> grads(dy);
    const Map<T> to(dx);
    const int64_t channels = dy.size[1], height = dy.size[2], width = dy.size[3];
    return for_each_row<A>(dx, channels, [&](int64_t n, int64_t i, A* zeros) {
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
