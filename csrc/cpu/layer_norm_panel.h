// A norm over the channels of some pixels of a packed panel, from it to dense pixels and back.
#pragma once
#include "lines.h"

namespace vops {
namespace VOPS_ISA {

// A pixel's channels in blocks; weight and bias are padded with zeros to whole blocks.
template <class A>
struct PanelNorm {
  const A *weight, *bias;
  int64_t channels, last;  // last: the block that may be ragged
  int tail;                // its channels
  A inverse_count, eps;
};
template <class A>
PanelNorm<A> norm_of(const A* weight, const A* bias, int64_t channels, double eps) {
  const int64_t last = (channels - 1) / kLanes;
  return {weight, bias, channels, last, (int)(channels - last * kLanes), (A)(1. / channels), (A)eps};
}

// Calls f(block, how many of its channels there are).
template <class A, class F>
VOPS_INLINE void for_each_block(const PanelNorm<A>& norm, const F& f) {
  for (int64_t b = 0; b < norm.last; b++) f(b, kLanes);
  f(norm.last, norm.tail);
}
template <class T>
VOPS_INLINE auto load_channels(const T* p, int n) {
  return n == kLanes ? load(p) : load_n(p, n);
}
template <class T, class V>
VOPS_INLINE void store_channels(T* p, V v, int n) {
  if (n == kLanes) return store(p, v);
  store_n(p, v, n);
}

// Where dense pixels lie: y or its gradient, and the statistics, which may both be null.
template <class T, class A>
struct Normalized {
  T* y;
  A *mean, *rstd;
  Normalized at(int64_t pixel, int64_t channels) const {
    if (!mean) return {y + pixel * channels, mean, rstd};
    return {y + pixel * channels, mean + pixel, rstd + pixel};
  }
};

// The first `count` of kLanes pixels of a panel of all blocks; the panel may hold anything in the others, but they are
// read. Its lanes without a channel are zero.
template <class T, class A>
void normalize(const PanelNorm<A>& norm, const A* panel, int64_t block_step, int count, const Normalized<T, A>& out) {
  A mean[kLanes], rstd[kLanes], exists[kLanes];
  Vec<A> sums[kLanes] = {}, squares[kLanes] = {};
  for (int k = 0; k < kLanes; k++) exists[k] = k < norm.tail;
  for (int64_t b = 0; b <= norm.last; b++) {
#pragma GCC unroll 16
    for (int p = 0; p < kLanes; p++) sums[p] += load(panel + b * block_step + p * kLanes);
  }
  store(mean, lane_sums(sums) * norm.inverse_count);
  for (int64_t b = 0; b < norm.last; b++) {
#pragma GCC unroll 16
    for (int p = 0; p < kLanes; p++) {
      const Vec<A> d = load(panel + b * block_step + p * kLanes) - mean[p];
      squares[p] += d * d;
    }
  }
  for (int p = 0; p < kLanes; p++) {
    const Vec<A> d = (load(panel + norm.last * block_step + p * kLanes) - mean[p]) * load(exists);
    squares[p] += d * d;
  }
  store(rstd, inverse_sqrt(lane_sums(squares) * norm.inverse_count + norm.eps));
  for (int p = 0; p < count; p++) {
    for_each_block(norm, [&](int64_t b, int n) {
      const Vec<A> u = load(panel + b * block_step + p * kLanes);
      const int64_t to = p * norm.channels + b * kLanes;
      const Vec<A> y = (u - mean[p]) * rstd[p] * load(norm.weight + b * kLanes) + load(norm.bias + b * kLanes);
      store_channels(out.y + to, y, n);
    });
    if (out.mean) out.mean[p] = mean[p], out.rstd[p] = rstd[p];
  }
}

// With g = dy * weight and d = (u - mean) * rstd: u becomes du = rstd * (g - mean(g) - d * mean(g * d)), in the panel
// of all blocks; what that has in lanes without a channel has no meaning. Adds dy * d and dy to the two vectors of
// block b at sums + b * step, unless it is null.
template <class T, class A>
void normalize_backward(const PanelNorm<A>& norm, const Normalized<const T, const A>& in, int count, A* panel,
                        int64_t block_step, A* sums, int64_t step) {
  A mean[kLanes] = {}, rstd[kLanes] = {}, mean_g[kLanes], slope[kLanes];
  memcpy(mean, in.mean, count * sizeof(A));
  memcpy(rstd, in.rstd, count * sizeof(A));
  Vec<A> of_g[kLanes] = {}, of_gd[kLanes] = {};
  for (int p = 0; p < count; p++) {
    Vec<A> sum_g = {}, sum_gd = {};  // in registers
    for_each_block(norm, [&](int64_t b, int n) {
      const Vec<A> g = load_channels(in.y + p * norm.channels + b * kLanes, n) * load(norm.weight + b * kLanes);
      sum_g += g;
      sum_gd += g * (load(panel + b * block_step + p * kLanes) - mean[p]);
    });
    of_g[p] = sum_g, of_gd[p] = sum_gd;
  }
  store(mean_g, lane_sums(of_g) * norm.inverse_count);
  store(slope, lane_sums(of_gd) * norm.inverse_count * load(rstd));
  // Block by block over the pixels, so that the sums stay in registers.
  for_each_block(norm, [&](int64_t b, int n) {
    const Vec<A> weight = load(norm.weight + b * kLanes);
    Vec<A> dweight = {}, dbias = {};
    for (int p = 0; p < count; p++) {
      A* u = panel + b * block_step + p * kLanes;
      const Vec<A> grad = load_channels(in.y + p * norm.channels + b * kLanes, n), d = (load(u) - mean[p]) * rstd[p];
      dweight += grad * d;
      dbias += grad;
      store(u, (grad * weight - mean_g[p] - d * slope[p]) * rstd[p]);
    }
    if (!sums) return;
    A* to = sums + b * step;
    store(to, load(to) + dweight);
    store(to + kLanes, load(to + kLanes) + dbias);
  });
}

}  // namespace VOPS_ISA
}  // namespace vops
