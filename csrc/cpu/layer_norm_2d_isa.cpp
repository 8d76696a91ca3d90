// Two kernels: one with channels in the lanes, for channels_last tensors in place and for packed panels of anything
// else, and one with pixels in the lanes, for planes of contiguous NCHW. Both read a pixel's channels up to three times
// and from memory once: what they work on at a time stays in the caches.
#include "layer_norm_2d.h"
#include "parallel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Multiply-adds that an element costs, about, for for_each_task.
constexpr int64_t kElementWork = 8;

template <class A>
struct Norm {
  const A *weight, *bias;  // padded with zeros to whole blocks; bias is for the forward pass only
  int64_t channels;
  double eps;
  int64_t full() const { return channels / kLanes; }
  int tail() const { return (int)(channels % kLanes); }
  A inverse_count() const { return (A)(1. / channels); }
};

// --- Channels in the lanes

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

// Zeroes the lanes from n on: those after the last channel.
template <class A>
VOPS_INLINE Vec<A> first_lanes(Vec<A> v, int n) {
  for (int k = 0; k < kLanes; k++) v[k] = k < n ? v[k] : 0;
  return v;
}

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

template <class T, class A>
VOPS_INLINE void forward_group(const Norm<A>& norm, const Group<const T, A>& x, const Group<T, A>& y) {
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
    const Pixel<T, A> out = y.pixel(p);
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
template <class T, class A>
VOPS_INLINE void backward_group(const Norm<A>& norm, const Group<const T, A>& dy, const Group<const T, A>& x,
                                const Group<T, A>* dx, A* sums) {
  Statistics<A> s;
  means(norm, x, s.mean);
  Vec<A> squares[kLanes], of_g[kLanes], of_gd[kLanes];
  for (int p = 0; p < kLanes; p++) {
    Vec<A> sum[3] = {};
    if (p < x.count) {
      const Pixel<const T, A> in = x.pixel(p), grad = dy.pixel(p);
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

template <class T, class A>
void forward_channels(const Norm<A>& norm, const Panel<const T>& x, const Panel<T>& y, RowRange rows) {
  const bool joined = gapless(x) && gapless(y);
  const Pixels pixels = joined ? Pixels{{rows.begin, rows.begin + 1}, rows.size() * x.width} : Pixels{rows, x.width};
  for_each_group(pixels, kLanes, [&](int64_t row, int64_t column, int count) {
    forward_group<T, A>(norm, group_of<A>(x, row, column, count), group_of<A>(y, row, column, count));
  });
}

template <class T, class A>
void backward_channels(const Norm<A>& norm, const Panel<const T>& dy, const Panel<const T>& x, const Panel<T>* dx,
                       A* sums, RowRange rows) {
  const bool joined = gapless(dy) && gapless(x) && (!dx || gapless(*dx));
  const Pixels pixels = joined ? Pixels{{rows.begin, rows.begin + 1}, rows.size() * x.width} : Pixels{rows, x.width};
  // As many pixels as the first-level cache holds, x and dy.
  const int64_t most = clamp64(4096 / norm.channels, 2, kLanes);
  for_each_group(pixels, most, [&](int64_t row, int64_t column, int count) {
    const Group<const T, A> grad = group_of<A>(dy, row, column, count), in = group_of<A>(x, row, column, count);
    if (dx) {
      const Group<T, A> out = group_of<A>(*dx, row, column, count);
      backward_group<T, A>(norm, grad, in, &out, sums);
    } else {
      backward_group<T, A>(norm, grad, in, nullptr, sums);
    }
  });
}

// --- Pixels in the lanes

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

template <class T, int V, bool kFull>
void forward_tile(const Norm<float>& norm, Planes<const T> x, Planes<T> y, int n, float* copy) {
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
template <class T, int V, bool kFull>
void backward_tile(const Norm<float>& norm, Planes<const T> dy, Planes<const T> x, Planes<T> dx, int n, float* sums,
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
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class F>
VOPS_INLINE void for_each_tile(int64_t begin, int64_t end, const F& f) {
  int64_t p = begin;
  for (; p + kTile * kLanes <= end; p += kTile * kLanes) f(p, kTile * kLanes, Count<kTile>(), Count<1>());
  if (end - p > kLanes) {
    f(p, (int)(end - p), Count<kTile>(), Count<0>());
  } else if (end > p) {
    f(p, (int)(end - p), Count<1>(), Count<0>());
  }
}

template <class T>
VOPS_INLINE Planes<T> planes(const Tensor4& t, int64_t n, int64_t pixel) {
  return {t.data ? (T*)t.data + n * t.stride[0] + pixel : nullptr, t.stride[1]};
}

// --- Which kernel, and how the work is cut

enum Way { kChannels, kPlanes, kPacked };

bool has_planes(const Tensor4& t) {
  return (t.stride[3] == 1 || t.size[3] == 1) && (t.stride[2] == t.size[3] || t.size[2] == 1);
}

Way way_of(const Tensor4& a, const Tensor4& b, const Tensor4& c) {
  if (a.dtype == kFloat64) return kPacked;
  auto all = [&](auto holds) { return holds(a) && holds(b) && (!c.data || holds(c)); };
  if (all(is_channels_last)) return kChannels;
  return all(has_planes) ? kPlanes : kPacked;
}

// Images that follow each other without a gap are one tall image.
bool stacks(const Tensor4& t) { return !t.data || (is_channels_last(t) && t.stride[0] == t.size[2] * t.stride[2]); }
void stack(Tensor4& t) {
  t.size[2] *= t.size[0];
  t.size[0] = 1;
}

// Rows of images, cut so that a task's packed panels fit the cache; where the way is kPlanes, a row is a tile.
struct Work {
  Way way;
  int64_t channels, batch, height, width;
  Cut cut;
  int64_t tasks() const { return cut.groups * cut.chunks; }
  int64_t elements() const { return channels * batch * height * width; }
  int64_t padded() const { return ceil_div(channels, kLanes) * kLanes; }
  int64_t panel_elements() const { return padded() * cut.rows * width; }
};
Work cut_norm(Way way, const Tensor4& x, int64_t element_bytes, int64_t tensors, int64_t tasks) {
  Work w = {way, x.size[1], x.size[0], x.size[2], x.size[3], {}};
  const int64_t batch = max64(w.batch, 1), tile = kTile * kLanes;
  const int64_t row_bytes = way == kPacked ? w.padded() * w.width * tensors * element_bytes : 1;
  w.cut = way == kPlanes ? cut_work(batch, 1, ceil_div(w.height * w.width, tile), tile, row_bytes, 0, tasks)
                         : cut_work(batch, 1, w.height, w.width, row_bytes, 0, tasks);
  return w;
}

// Calls f(image, rows) for the rows of a task, or the pixels where the way is kPlanes.
template <class F>
VOPS_INLINE void for_each_part(const Work& w, int64_t task, const F& f) {
  const int64_t pixels = w.height * w.width, tile = kTile * kLanes;
  const RowRange images = w.cut.images_of(task / w.cut.chunks, w.batch);
  for (int64_t n = images.begin; n < images.end; n++) {
    if (w.way == kPlanes) {
      const RowRange tiles = w.cut.rows_of(task % w.cut.chunks, ceil_div(pixels, tile));
      f(n, RowRange{tiles.begin * tile, min64(tiles.end * tile, pixels)});
    } else {
      f(n, w.cut.rows_of(task % w.cut.chunks, w.height));
    }
  }
}

template <class F>
VOPS_INLINE void with_type(int dtype, const F& f) {
  if (dtype == kFloat32) f(float());
  if (dtype == kBFloat16) f(bf16());
  if (dtype == kFloat16) f(f16());
}

template <class A>
Error run_forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, double eps) {
  const Way way = way_of(x, y, {});
  const Work work = cut_norm(way, x, sizeof(A), 1, tasks_for_threads());
  const Channels channels = {0, work.channels};
  const int64_t padded = work.padded();
  const int64_t own = way == kPlanes ? work.channels * kTile * kLanes : way == kPacked ? work.panel_elements() : 0;
  const int64_t elements = 2 * padded + own;
  return for_each_task<A>(work.tasks(), work.elements() * kElementWork, elements, [&](int64_t task, A* scratch) {
    A *weight = scratch, *bias = weight + padded, *tile = bias + padded;
    pack_weight(w, channels, weight, kLanes);
    pack_bias(b, channels, bias, kLanes);
    const Norm<A> norm = {weight, bias, work.channels, eps};
    for_each_part(work, task, [&](int64_t n, RowRange part) {
      if (way == kPacked) {
        const int64_t block_step = part.size() * work.width * kLanes;
        pack_rows(x, n, channels, part.begin, part.end, tile, block_step);
        const Panel<A> panel = packed_panel(tile, part.begin, work.width, block_step);
        const Panel<const A> in = packed_panel<const A>(tile, part.begin, work.width, block_step);
        forward_channels<A, A>(norm, in, panel, part);
        unpack_rows<A>(tile, block_step, y, n, channels, part.begin, part.end);
      } else if constexpr (sizeof(A) == sizeof(float)) {
        with_type(x.dtype, [&](auto type) {
          typedef decltype(type) T;
          if (way == kChannels) {
            return forward_channels<T, A>(norm, tensor_panel<const T>(x, n, 0), tensor_panel<T>(y, n, 0), part);
          }
          for_each_tile(part.begin, part.end, [&](int64_t p, int count, auto vectors, auto full) {
            forward_tile<T, decltype(vectors)::value, decltype(full)::value == 1>(norm, planes<const T>(x, n, p),
                                                                                  planes<T>(y, n, p), count, tile);
          });
        });
      }
    });
  });
}

template <class A>
Error run_backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx, const Tensor4& dw,
                   const Tensor4& db, double eps) {
  const Way way = way_of(dy, x, dx);
  const Work work = cut_norm(way, x, sizeof(A), 2, kFixedTasks);
  const Channels channels = {0, work.channels};
  const int64_t padded = work.padded(), blocks = padded / kLanes, splits = min64(work.tasks(), kFixedTasks);
  const bool sum = dw.data || db.data;
  // A panel of the sums is a block's gradient of the weight and that of the bias.
  const WeightSums<A> sums = {sum ? (A*)thread_scratch(kSums, 2 * padded * splits * sizeof(A)) : nullptr, splits, 2};
  if (sum && !sums.data) return kOutOfMemory;
  const int64_t lanes = way == kPlanes ? 2 * work.channels * kLanes : 2 * padded;
  const int64_t own = way == kPlanes   ? 2 * work.channels * kTile * kLanes
                      : way == kPacked ? 2 * work.panel_elements()
                                       : 0;
  const int64_t elements = padded + lanes + own;
  const int64_t amount = 2 * work.elements() * kElementWork;
  const Error error = for_each_task<A>(splits, amount, elements, [&](int64_t split, A* scratch) {
    A *weight = scratch, *own_sums = weight + padded, *tile = own_sums + lanes;
    pack_weight(w, channels, weight, kLanes);
    const Norm<A> norm = {weight, nullptr, work.channels, eps};
    if (sum) memset(own_sums, 0, lanes * sizeof(A));
    A* to = sum ? own_sums : nullptr;
    for (int64_t task = split * work.tasks() / splits; task < (split + 1) * work.tasks() / splits; task++) {
      for_each_part(work, task, [&](int64_t n, RowRange part) {
        if (way == kPacked) {
          const int64_t block_step = part.size() * work.width * kLanes;
          A* grads = tile + padded * part.size() * work.width;
          pack_rows(x, n, channels, part.begin, part.end, tile, block_step);
          pack_rows(dy, n, channels, part.begin, part.end, grads, block_step);
          const Panel<const A> in = packed_panel<const A>(tile, part.begin, work.width, block_step);
          const Panel<const A> grad = packed_panel<const A>(grads, part.begin, work.width, block_step);
          const Panel<A> out = packed_panel(tile, part.begin, work.width, block_step);
          backward_channels<A, A>(norm, grad, in, &out, to, part);
          if (dx.data) unpack_rows<A>(tile, block_step, dx, n, channels, part.begin, part.end);
        } else if constexpr (sizeof(A) == sizeof(float)) {
          with_type(x.dtype, [&](auto type) {
            typedef decltype(type) T;
            if (way == kChannels) {
              const Panel<T> out = dx.data ? tensor_panel<T>(dx, n, 0) : Panel<T>{};
              return backward_channels<T, A>(norm, tensor_panel<const T>(dy, n, 0), tensor_panel<const T>(x, n, 0),
                                             dx.data ? &out : nullptr, to, part);
            }
            for_each_tile(part.begin, part.end, [&](int64_t p, int count, auto vectors, auto full) {
              backward_tile<T, decltype(vectors)::value, decltype(full)::value == 1>(
                  norm, planes<const T>(dy, n, p), planes<const T>(x, n, p), planes<T>(dx, n, p), count, to, tile);
            });
          });
        }
      });
    }
    for (int64_t i = 0; sum && i < blocks; i++) {
      A* panel = sums.panel(i, split);
      if (way != kPlanes) {
        memcpy(panel, own_sums + i * 2 * kLanes, 2 * kLanes * sizeof(A));
        continue;
      }
      for (int which = 0; which < 2; which++) {
        Vec<A> v[kLanes];
        for (int k = 0; k < kLanes; k++) {
          const int64_t c = i * kLanes + k;
          v[k] = c < work.channels ? load(own_sums + (c * 2 + which) * kLanes) : Vec<A>{};
        }
        store(panel + which * kLanes, lane_sums(v));
      }
    }
  });
  if (error) return error;
  for (int64_t i = 0; sum && i < blocks; i++) {
    add_splits(sums, 1, i, channels_of_blocks(work.channels, i, 1), dw, db);
  }
  return nullptr;
}

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, double eps) {
  Tensor4 in = x, out = y;
  if (x.size[0] > 0 && stacks(in) && stacks(out)) stack(in), stack(out);
  return (x.dtype == kFloat64 ? run_forward<double> : run_forward<float>)(in, w, b, out, eps);
}

Error backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx, const Tensor4& dw,
               const Tensor4& db, double eps) {
  Tensor4 grad = dy, in = x, out = dx;
  if (x.size[0] > 0 && stacks(grad) && stacks(in) && stacks(out)) stack(grad), stack(in), stack(out);
  return (x.dtype == kFloat64 ? run_backward<double> : run_backward<float>)(grad, in, w, out, dw, db, eps);
}

}  // namespace

extern const LayerNorm2dOps layer_norm_2d_ops;
const LayerNorm2dOps layer_norm_2d_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
