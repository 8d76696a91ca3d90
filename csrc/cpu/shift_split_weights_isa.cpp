// The weights of the branches, from sums over the pixels: small products, an activation and a softmax for every image.
#include "shift_split.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Of images that share the reads of a matrix.
constexpr int kImages = 4;
constexpr int64_t kMatrixRows = 32, kMatrixColumns = 4 * kLanes, kSumRows = 128;  // of a task, of a task, of a sum

// out (N, O) = in (N, I) times the transpose of the matrix (O, I).
Error multiply(const Tensor4& matrix, const void* in, int64_t images, void* out) {
  return with_type(matrix.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
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
          for (int i = 0; i < min64(kImages, images - n); i++) ((A*)out)[(n + i) * rows + r] = sum_of_lanes<A>(sum[i]);
        }
      }
    });
  });
}

// din (N, I) = dout (N, O) times the matrix, whose own gradient may be absent.
Error multiply_backward(const void* dout, const Tensor4& matrix, const void* in, int64_t images, const Tensor4& dmatrix,
                        void* din) {
  return with_type(matrix.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
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

}  // namespace

Error pool(const Tensor4& sums, const Tensor4& pooled) {
  return with_sum_type(sums.dtype, [&](auto zero) {
    typedef decltype(zero) A;
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

// What is summed over the pixels goes through a linear layer as they do. A moved branch has, for each quarter of its
// channels, one sum of x for an input.
Error pool_linear(const Tensor4& sums, const Tensor4& mlp1, const Tensor4& b, int64_t pixels, const Tensor4& pooled) {
  return with_type(mlp1.dtype, [&](auto type) {
    typedef decltype(type) T;
    typedef SumOf<T> A;
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
            small<A>(pooled, n)[c] = sum_of_lanes<A>(sum) + bias * pixels;
          }
        }
      }
    });
  });
}

Error branch_weights(const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2, const Tensor4& hidden,
                     const Tensor4& weights) {
  return with_sum_type(pooled.dtype, [&](auto zero) {
    typedef decltype(zero) A;
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
  return with_sum_type(pooled.dtype, [&](auto zero) {
    typedef decltype(zero) A;
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

}  // namespace VOPS_ISA
}  // namespace vops
