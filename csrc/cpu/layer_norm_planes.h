// A norm with pixels in the lanes: of planes of contiguous NCHW.
#pragma once
#include "layer_norm.h"

namespace vops {
namespace VOPS_ISA {

constexpr int kTile = 4;  // vectors of pixels at a time: a run of some cache lines in every plane

template <class T>
struct Planes {
  T* data;
  int64_t step;  // from a channel to the next
};

// The pixels of a tile: all of its lanes, or the first n.
template <int V, bool kFull, class T>
VOPS_INLINE void load_pixels(const T* p, int n, Float (&v)[V]) {
  for (int k = 0; k < V; k++, n -= kLanes) {
    v[k] = kFull || n >= kLanes ? load(p + k * kLanes) : n > 0 ? load_n(p + k * kLanes, n) : Float{};
  }
}
template <int V, bool kFull, class T>
VOPS_INLINE void store_pixels(T* p, int n, const Float (&v)[V]) {
  for (int k = 0; k < V; k++, n -= kLanes) {
    if (kFull || n >= kLanes) {
      store(p + k * kLanes, v[k]);
    } else if (n > 0) {
      store_n(p + k * kLanes, v[k], n);
    }
  }
}

// The planes may lie so that all lines of a tile fall into one set of the cache, so it is copied, [channel][V][lane].
template <class T, int V, bool kFull>
VOPS_INLINE void copy_tile(const Norm<float>& norm, Planes<const T> x, int n, float* copy, Float (&mean)[V]) {
  for (int k = 0; k < V; k++) mean[k] = Float{};
  for (int64_t c = 0; c < norm.channels; c++, copy += V * kLanes) {
    Float v[V];
    load_pixels<V, kFull>(x.data + c * x.step, n, v);
    for (int k = 0; k < V; k++) {
      mean[k] += v[k];
      store(copy + k * kLanes, v[k]);
    }
  }
  for (int k = 0; k < V; k++) mean[k] *= norm.inverse_count();
}

template <class T, class Out, int V, bool kFull>
void forward_tile(const Norm<float>& norm, Planes<const T> x, Planes<Out> y, int n, float* copy) {
  Float mean[V], rstd[V] = {};
  copy_tile<T, V, kFull>(norm, x, n, copy, mean);
  for (int64_t c = 0; c < norm.channels; c++) {
    for (int k = 0; k < V; k++) {
      const Float d = load(copy + (c * V + k) * kLanes) - mean[k];
      rstd[k] += d * d;
    }
  }
  for (int k = 0; k < V; k++) rstd[k] = inverse_sqrt(rstd[k] * norm.inverse_count() + (float)norm.eps);
  for (int64_t c = 0; c < norm.channels; c++) {
    Float v[V];
    for (int k = 0; k < V; k++) {
      v[k] = (load(copy + (c * V + k) * kLanes) - mean[k]) * rstd[k] * norm.weight[c] + norm.bias[c];
    }
    store_pixels<V, kFull>(y.data + c * y.step, n, v);
  }
}

// dx.data and sums, [channel][2][lane], may be null.
template <class Grad, class T, int V, bool kFull>
void backward_tile(const Norm<float>& norm, Planes<const Grad> dy, Planes<const T> x, Planes<T> dx, int n, float* sums,
                   float* copy) {
  float* grads = copy + norm.channels * V * kLanes;
  Float mean[V], rstd[V] = {}, mean_g[V] = {}, slope[V] = {};
  copy_tile<T, V, kFull>(norm, x, n, copy, mean);
  for (int64_t c = 0; c < norm.channels; c++) {
    Float grad[V];
    load_pixels<V, kFull>(dy.data + c * dy.step, n, grad);
    for (int k = 0; k < V; k++) {
      const Float d = load(copy + (c * V + k) * kLanes) - mean[k], g = grad[k] * norm.weight[c];
      store(grads + (c * V + k) * kLanes, grad[k]);
      rstd[k] += d * d;
      mean_g[k] += g;
      slope[k] += g * d;
    }
  }
  for (int k = 0; k < V; k++) {
    rstd[k] = inverse_sqrt(rstd[k] * norm.inverse_count() + (float)norm.eps);
    // Lanes without a pixel: with eps = 0 theirs would be infinite, and NaN in the sums.
    if (!kFull) rstd[k] = first_lanes<float>(rstd[k], n - k * kLanes);
    mean_g[k] *= norm.inverse_count();
    slope[k] *= norm.inverse_count() * rstd[k] * rstd[k];
  }
  for (int64_t c = 0; c < norm.channels; c++) {
    Float v[V], dw = {}, db = {};
    for (int k = 0; k < V; k++) {
      const Float d = load(copy + (c * V + k) * kLanes) - mean[k], grad = load(grads + (c * V + k) * kLanes);
      dw += grad * (d * rstd[k]);
      db += grad;
      v[k] = (grad * norm.weight[c] - mean_g[k] - d * slope[k]) * rstd[k];
    }
    if (dx.data) store_pixels<V, kFull>(dx.data + c * dx.step, n, v);
    if (!sums) continue;
    float* to = sums + c * 2 * kLanes;
    store(to, load(to) + dw);
    store(to + kLanes, load(to + kLanes) + db);
  }
}

// Calls f(pixel, how many, vectors in the tile, whether they fill it), the last two as types.
template <class F>
VOPS_INLINE void for_each_tile(int64_t begin, int64_t end, const F& f) {
  int64_t p = begin;
  for (; p + kTile * kLanes <= end; p += kTile * kLanes) f(p, kTile * kLanes, Constant<kTile>(), Constant<true>());
  if (end - p > kLanes) {
    f(p, (int)(end - p), Constant<kTile>(), Constant<false>());
  } else if (end > p) {
    f(p, (int)(end - p), Constant<1>(), Constant<false>());
  }
}

template <class T>
VOPS_INLINE Planes<T> planes(const Tensor4& t, int64_t n, int64_t pixel) {
  return {t.data ? (T*)t.data + n * t.stride[0] + pixel : nullptr, t.stride[1]};
}

}  // namespace VOPS_ISA
}  // namespace vops
