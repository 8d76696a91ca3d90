// A norm with channels in the lanes: of channels_last tensors in place, and of packed panels of anything else.
#pragma once
#include "layer_norm.h"

namespace vops {
namespace VOPS_ISA {

// The channels of one pixel, block by block. Those of a tensor end with the last channel; a packed panel is padded.
template <class T, class A>
struct Pixel {
  T* data;
  int64_t block_step;
  Vec<A> block(int64_t i) const { return load(data + i * block_step); }
  Vec<A> last(int64_t i, int n) const {
    if constexpr (sizeof(T) == sizeof(double)) return block(i);
    if constexpr (sizeof(T) < sizeof(double)) return load_n(data + i * block_step, n);
  }
  void set_block(int64_t i, Vec<A> v) const { store(data + i * block_step, v); }
  void set_last(int64_t i, int n, Vec<A> v) const {
    if constexpr (sizeof(T) == sizeof(double)) return set_block(i, v);
    if constexpr (sizeof(T) < sizeof(double)) return store_n(data + i * block_step, v, n);
  }
};

// sums[k] += the k-th of the `count` values that f(block index, whether it is the last, ragged one) returns.
template <class A, int count, class F>
VOPS_INLINE void sum_blocks(const Norm<A>& norm, Vec<A> (&sums)[count], const F& f) {
  const int64_t full = norm.full();
  int64_t i = 0;
  if (full >= 2) {  // two chains of additions, which do not wait for each other
    Vec<A> odd[count] = {};
    for (; i + 2 <= full; i += 2) {
      f(i, false, sums);
      f(i + 1, false, odd);
    }
    for (int k = 0; k < count; k++) sums[k] += odd[k];
  }
  if (i < full) f(i, false, sums);
  if (norm.tail()) f(full, true, sums);
}

template <class T, class A>
struct Group {  // of at most kLanes pixels of a row
  T* data;
  int64_t pixel_step, block_step;
  int count;
  Pixel<T, A> pixel(int p) const { return {data + p * pixel_step, block_step}; }
};

template <class A>
struct Statistics {
  A mean[kLanes], rstd[kLanes];
};

template <class T, class A>
VOPS_INLINE void means(const Norm<A>& norm, const Group<T, A>& x, A* mean) {
  Vec<A> sums[kLanes];
  for (int p = 0; p < kLanes; p++) {
    Vec<A> sum[1] = {};
    if (p < x.count) {
      const Pixel<T, A> in = x.pixel(p);
      sum_blocks<A, 1>(norm, sum, [&](int64_t i, bool ragged, Vec<A>(&to)[1]) {
        to[0] += ragged ? in.last(i, norm.tail()) : in.block(i);
      });
    }
    sums[p] = sum[0];
  }
  store(mean, lane_sums(sums) * norm.inverse_count());
}

template <class A>
VOPS_INLINE void inverse_deviations(const Norm<A>& norm, Vec<A> squares, A* rstd) {
  store(rstd, inverse_sqrt(squares * norm.inverse_count() + (A)norm.eps));
}

template <class T, class Out, class A>
VOPS_INLINE void forward_group(const Norm<A>& norm, const Group<const T, A>& x, const Group<Out, A>& y) {
  Statistics<A> s;
  means(norm, x, s.mean);
  Vec<A> squares[kLanes];
  for (int p = 0; p < kLanes; p++) {
    Vec<A> sum[1] = {};
    if (p < x.count) {
      const Pixel<const T, A> in = x.pixel(p);
      const A mean = s.mean[p];
      sum_blocks<A, 1>(norm, sum, [&](int64_t i, bool ragged, Vec<A>(&to)[1]) {
        const Vec<A> d = ragged ? first_lanes<A>(in.last(i, norm.tail()) - mean, norm.tail()) : in.block(i) - mean;
        to[0] += d * d;
      });
    }
    squares[p] = sum[0];
  }
  inverse_deviations(norm, lane_sums(squares), s.rstd);
  for (int p = 0; p < x.count; p++) {
    const Pixel<const T, A> in = x.pixel(p);
    const Pixel<Out, A> out = y.pixel(p);
    const A mean = s.mean[p], rstd = s.rstd[p];
    auto normalized = [&](Vec<A> v, int64_t i) {
      return (v - mean) * rstd * load(norm.weight + i * kLanes) + load(norm.bias + i * kLanes);
    };
    const int64_t full = norm.full();
    for (int64_t i = 0; i < full; i++) out.set_block(i, normalized(in.block(i), i));
    if (norm.tail()) out.set_last(full, norm.tail(), normalized(in.last(full, norm.tail()), full));
  }
}

// With g = dy * w and d = x - mean: dx = rstd * (g - mean(g) - d * rstd^2 * mean(g * d)). Adds dy * d * rstd and dy to
// the panels of `sums`, [block][2][lane], unless it is null.
template <class Grad, class T, class A>
VOPS_INLINE void backward_group(const Norm<A>& norm, const Group<const Grad, A>& dy, const Group<const T, A>& x,
                                const Group<T, A>* dx, A* sums) {
  Statistics<A> s;
  means(norm, x, s.mean);
  Vec<A> squares[kLanes], of_g[kLanes], of_gd[kLanes];
  for (int p = 0; p < kLanes; p++) {
    Vec<A> sum[3] = {};
    if (p < x.count) {
      const Pixel<const T, A> in = x.pixel(p);
      const Pixel<const Grad, A> grad = dy.pixel(p);
      const A mean = s.mean[p];
      sum_blocks<A, 3>(norm, sum, [&](int64_t i, bool ragged, Vec<A>(&to)[3]) {
        const Vec<A> d = ragged ? first_lanes<A>(in.last(i, norm.tail()) - mean, norm.tail()) : in.block(i) - mean;
        const Vec<A> g = (ragged ? grad.last(i, norm.tail()) : grad.block(i)) * load(norm.weight + i * kLanes);
        to[0] += d * d;
        to[1] += g;
        to[2] += g * d;
      });
    }
    squares[p] = sum[0], of_g[p] = sum[1], of_gd[p] = sum[2];
  }
  inverse_deviations(norm, lane_sums(squares), s.rstd);
  A mean_g[kLanes], slope[kLanes];
  const Vec<A> rstd = load(s.rstd);
  store(mean_g, lane_sums(of_g) * norm.inverse_count());
  store(slope, lane_sums(of_gd) * norm.inverse_count() * rstd * rstd);
  // Block by block over the pixels, so that the sums stay in registers.
  const int64_t blocks = norm.full() + (norm.tail() > 0);
  for (int64_t i = 0; i < blocks; i++) {
    const bool ragged = i == norm.full();
    const Vec<A> weight = load(norm.weight + i * kLanes);
    Vec<A> dw = {}, db = {};
    for (int p = 0; p < x.count; p++) {
      const Vec<A> d = (ragged ? x.pixel(p).last(i, norm.tail()) : x.pixel(p).block(i)) - s.mean[p];
      const Vec<A> grad = ragged ? dy.pixel(p).last(i, norm.tail()) : dy.pixel(p).block(i);
      dw += grad * (d * s.rstd[p]);
      db += grad;
      if (!dx) continue;
      const Vec<A> v = (grad * weight - mean_g[p] - d * slope[p]) * s.rstd[p];
      if (ragged) {
        dx->pixel(p).set_last(i, norm.tail(), v);
      } else {
        dx->pixel(p).set_block(i, v);
      }
    }
    if (!sums) continue;
    A* to = sums + i * 2 * kLanes;
    store(to, load(to) + dw);
    store(to + kLanes, load(to + kLanes) + db);
  }
}

template <class A, class T>
VOPS_INLINE Group<T, A> group_of(const Panel<T>& t, int64_t row, int64_t column, int count) {
  return {t.at(row, column), t.column_step, t.block_step, count};
}

// Rows without a gap between them are one long row.
struct Pixels {
  RowRange rows;
  int64_t columns;
};
template <class T>
VOPS_INLINE bool gapless(const Panel<T>& t) {
  return t.row_step == t.width * t.column_step;
}

template <class F>
VOPS_INLINE void for_each_group(Pixels pixels, int64_t most, const F& f) {
  for (int64_t row = pixels.rows.begin; row < pixels.rows.end; row++) {
    for (int64_t j = 0; j < pixels.columns; j += most) f(row, j, (int)min64(most, pixels.columns - j));
  }
}

template <class T, class Out, class A>
void forward_channels(const Norm<A>& norm, const Panel<const T>& x, const Panel<Out>& y, RowRange rows) {
  const bool joined = gapless(x) && gapless(y);
  const Pixels pixels = joined ? Pixels{{rows.begin, rows.begin + 1}, rows.size() * x.width} : Pixels{rows, x.width};
  for_each_group(pixels, kLanes, [&](int64_t row, int64_t column, int count) {
    forward_group<T, Out, A>(norm, group_of<A>(x, row, column, count), group_of<A>(y, row, column, count));
  });
}

template <class Grad, class T, class A>
void backward_channels(const Norm<A>& norm, const Panel<const Grad>& dy, const Panel<const T>& x, const Panel<T>* dx,
                       A* sums, RowRange rows) {
  const bool joined = gapless(dy) && gapless(x) && (!dx || gapless(*dx));
  const Pixels pixels = joined ? Pixels{{rows.begin, rows.begin + 1}, rows.size() * x.width} : Pixels{rows, x.width};
  // As many pixels as the first-level cache holds, x and dy.
  const int64_t most = clamp64(4096 / norm.channels, 2, kLanes);
  for_each_group(pixels, most, [&](int64_t row, int64_t column, int count) {
    const Group<const Grad, A> grad = group_of<A>(dy, row, column, count);
    const Group<const T, A> in = group_of<A>(x, row, column, count);
    if (dx) {
      const Group<T, A> out = group_of<A>(*dx, row, column, count);
      backward_group<Grad, T, A>(norm, grad, in, &out, sums);
    } else {
      backward_group<Grad, T, A>(norm, grad, in, nullptr, sums);
    }
  });
}

}  // namespace VOPS_ISA
}  // namespace vops
