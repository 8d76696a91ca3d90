// A task owns all channels of some rows: the norm finds what the convolution computed in the cache.
#include "dwconv_layer_norm.h"

#include "parallel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Multiply-adds that the norm costs per element, about, for for_each_task.
constexpr int64_t kNormWork = 8;
// Pixels that a task of the backward pass has at least.
constexpr int64_t kTaskPixels = 32;
// Blocks of channels that are packed at once from channels_last tensors.
constexpr int64_t kTogether = 4;

template <class T>
struct AccumulatorOf {
  typedef float type;
};
template <>
struct AccumulatorOf<double> {
  typedef double type;
};

// A pixel's channels in blocks; weight and bias are padded with zeros to whole blocks.
template <class A>
struct Norm {
  const A *weight, *bias;
  int64_t channels, last;  // last: the block that may be ragged
  int tail;                // its channels
  A inverse_count, eps;
};
template <class A>
Norm<A> norm_of(const A* weight, const A* bias, int64_t channels, double eps) {
  const int64_t last = (channels - 1) / kLanes;
  return {weight, bias, channels, last, (int)(channels - last * kLanes), (A)(1. / channels), (A)eps};
}

// Calls f(block, how many of its channels there are).
template <class A, class F>
VOPS_INLINE void for_each_block(const Norm<A>& norm, const F& f) {
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

// Where the dense pixels of one group lie; u, mean and rstd may be null.
template <class T, class A>
struct Normalized {
  T *y, *u;
  A *mean, *rstd;
  Normalized at(int64_t pixel, int64_t channels) const {
    if (!u) return {y + pixel * channels, u, mean, rstd};
    return {y + pixel * channels, u + pixel * channels, mean + pixel, rstd + pixel};
  }
};

// The first `count` of kLanes pixels of a panel of all blocks; the panel may hold anything in the others, but they are
// read. Its lanes without a channel are zero.
template <class T, class A>
void normalize(const Norm<A>& norm, const A* panel, int64_t block_step, int count, const Normalized<T, A>& out) {
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
      if (out.u) store_channels(out.u + to, u, n);
    });
    if (out.u) out.mean[p] = mean[p], out.rstd[p] = rstd[p];
  }
}

// Kernel 3 has too little arithmetic to hide packing behind.
bool reads_in_place(const Tensor4& x, const DwConv& f) {
  return x.dtype == kFloat32 && f.kernel == 3 && is_channels_last(x) && x.size[1] % kLanes == 0;
}

template <class T>
Error forward_of(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w, const Tensor4& ln_b,
                 const Tensor4& y, const Tensor4& u, const Tensor4& statistics, DwConv f, double eps) {
  typedef typename AccumulatorOf<T>::type A;
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  if (batch * height * width == 0) return nullptr;
  const bool direct = reads_in_place(x, f);
  const int64_t taps = f.kernel * f.kernel, halo = f.kernel - 1, row = width * kLanes;
  const int64_t blocks = ceil_div(channels, kLanes), together = min64(blocks, is_channels_last(x) ? kTogether : 1);
  const int64_t row_bytes = (blocks + (direct ? 0 : together)) * row * sizeof(A);
  const Cut cut = cut_work(batch, 1, height, width, row_bytes, halo, tasks_for_threads());

  // Packed once for all tasks: where images are small, that costs about as much as the convolution of one.
  const Channels all = {0, channels};
  const int64_t weight_elements = (taps + 1) * kLanes;
  A* weight_data = (A*)thread_scratch(kSums, blocks * (weight_elements + 2 * kLanes) * sizeof(A));
  if (!weight_data) return kOutOfMemory;
  A *ln_weight = weight_data + blocks * weight_elements, *ln_bias = ln_weight + blocks * kLanes;
  pack_weight(w, all, weight_data, weight_elements);
  pack_bias(b, all, weight_data + taps * kLanes, weight_elements);
  pack_weight(ln_w, all, ln_weight, kLanes);
  pack_weight(ln_b, all, ln_bias, kLanes);
  const Weights<A> weights = {weight_data, weight_data + taps * kLanes, weight_elements};
  const Norm<A> norm = norm_of<A>(ln_weight, ln_bias, channels, eps);
  A* means = (A*)statistics.data;
  const Normalized<T, A> whole = {(T*)y.data, (T*)u.data, means, means ? means + batch * height * width : nullptr};

  const int64_t source_elements = direct ? 0 : min64(height, cut.rows + halo) * row, out_elements = cut.rows * row;
  const int64_t elements = together * source_elements + blocks * out_elements + kLanes * kLanes;
  const int64_t work = batch * channels * height * width * (taps + kNormWork);
  return for_each_task<A>(cut.groups * cut.chunks, work, elements, [&](int64_t task, A* scratch) {
    A *source_data = scratch, *out_data = source_data + together * source_elements;
    const RowRange rows = cut.rows_of(task % cut.chunks, height), read = input_rows(rows, height, f);
    const RowRange images = cut.images_of(task / cut.chunks, batch);
    const Panel<A> out = packed_panel(out_data, rows.begin, width, out_elements);
    for (int64_t n = images.begin; n < images.end; n++) {
      for (int64_t first = 0; first < blocks; first += together) {
        const Channels c = channels_of_blocks(channels, first, together);
        if (direct) {
          if constexpr (sizeof(T) == sizeof(float)) {
            conv_rows(tensor_panel<const T>(x, n, c.begin), height, weights.block(first), c.blocks(), f, rows,
                      out.block(first));
          }
          continue;
        }
        pack_rows(x, n, c, read.begin, read.end, source_data, source_elements);
        const Panel<const A> in = packed_panel<const A>(source_data, read.begin, width, source_elements);
        for (int64_t i = 0; i < c.blocks(); i++) {
          conv_rows(in.block(i), height, weights.block(first + i), 1, f, rows, out.block(first + i));
        }
      }
      const int64_t first = (n * height + rows.begin) * width, pixels = rows.size() * width;
      for (int64_t p = 0; p < pixels; p += kLanes) {
        const int count = (int)min64(kLanes, pixels - p);
        normalize(norm, out_data + p * kLanes, out_elements, count, whole.at(first + p, channels));
      }
    }
  });
}

// With g = dy * weight and d = (u - mean) * rstd: du = rstd * (g - mean(g) - d * mean(g * d)). Adds dy * d and dy to the
// panels of `sums`, [block][2][lane]. du may be null.
template <class T, class A>
void backward_group(const Norm<A>& norm, const T* dy, const T* u, const A* mean, const A* rstd, int count, T* du,
                    A* sums) {
  A mean_g[kLanes], slope[kLanes];
  if (du) {
    Vec<A> of_g[kLanes] = {}, of_gd[kLanes] = {};
    for (int p = 0; p < count; p++) {
      const int64_t pixel = p * norm.channels;
      for_each_block(norm, [&](int64_t b, int n) {
        const int64_t at = pixel + b * kLanes;
        const Vec<A> g = load_channels(dy + at, n) * load(norm.weight + b * kLanes);
        of_g[p] += g;
        of_gd[p] += g * (load_channels(u + at, n) - mean[p]);
      });
    }
    store(mean_g, lane_sums(of_g) * norm.inverse_count);
    store(slope, lane_sums(of_gd) * norm.inverse_count * load(rstd));
  }
  // Block by block over the pixels, so that the sums stay in registers.
  for_each_block(norm, [&](int64_t b, int n) {
    const Vec<A> weight = load(norm.weight + b * kLanes);
    Vec<A> dweight = {}, dbias = {};
    for (int p = 0; p < count; p++) {
      const int64_t at = p * norm.channels + b * kLanes;
      const Vec<A> grad = load_channels(dy + at, n), d = (load_channels(u + at, n) - mean[p]) * rstd[p];
      dweight += grad * d;
      dbias += grad;
      if (du) store_channels(du + at, (grad * weight - mean_g[p] - d * slope[p]) * rstd[p], n);
    }
    A* to = sums + b * 2 * kLanes;
    store(to, load(to) + dweight);
    store(to + kLanes, load(to + kLanes) + dbias);
  });
}

template <class T>
Error backward_of(const Tensor4& dy, const Tensor4& u, const Tensor4& statistics, const Tensor4& ln_w,
                  const Tensor4& du, const Tensor4& dln_w, const Tensor4& dln_b) {
  typedef typename AccumulatorOf<T>::type A;
  const int64_t channels = u.size[1], pixels = u.size[0] * u.size[2] * u.size[3];
  const int64_t blocks = ceil_div(channels, kLanes), padded = blocks * kLanes;
  const int64_t splits = clamp64(pixels / kTaskPixels, 1, kFixedTasks);
  A* memory = (A*)thread_scratch(kSums, padded * (1 + 2 * splits) * sizeof(A));
  if (!memory) return kOutOfMemory;
  // A panel of the sums is a block's gradient of the weight and that of the bias.
  const WeightSums<A> sums = {memory + padded, splits, 2};
  pack_weight(ln_w, {0, channels}, memory, kLanes);
  const Norm<A> norm = norm_of<A>(memory, nullptr, channels, 0);
  // As many pixels as the first-level cache holds, dy and u.
  const int64_t most = clamp64(4096 / channels, 2, kLanes);
  const A *means = (const A*)statistics.data, *rstds = means + pixels;

  const int64_t work = 2 * pixels * channels * kNormWork;
  const Error error = for_each_task<A>(splits, work, 2 * padded, [&](int64_t split, A* own) {
    memset(own, 0, 2 * padded * sizeof(A));
    const int64_t end = (split + 1) * pixels / splits;
    for (int64_t p = split * pixels / splits; p < end; p += most) {
      const int count = (int)min64(most, end - p);
      A mean[kLanes] = {}, rstd[kLanes] = {};
      memcpy(mean, means + p, count * sizeof(A));
      memcpy(rstd, rstds + p, count * sizeof(A));
      const int64_t at = p * channels;
      backward_group(norm, (const T*)dy.data + at, (const T*)u.data + at, mean, rstd, count,
                     du.data ? (T*)du.data + at : nullptr, own);
    }
    for (int64_t b = 0; b < blocks; b++) {
      memcpy(sums.panel(b, split), own + b * 2 * kLanes, 2 * kLanes * sizeof(A));
    }
  });
  if (error) return error;
  for (int64_t b = 0; b < blocks; b++) add_splits(sums, 1, b, channels_of_blocks(channels, b, 1), dln_w, dln_b);
  return nullptr;
}

template <class F>
Error with_type(int dtype, const F& f) {
  if (dtype == kFloat32) return f(float());
  if (dtype == kBFloat16) return f(bf16());
  if (dtype == kFloat16) return f(f16());
  return f(double());
}

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w, const Tensor4& ln_b,
              const Tensor4& y, const Tensor4& u, const Tensor4& statistics, DwConv conv, double eps) {
  return with_type(x.dtype, [&](auto type) {
    return forward_of<decltype(type)>(x, w, b, ln_w, ln_b, y, u, statistics, conv, eps);
  });
}
Error backward_norm(const Tensor4& dy, const Tensor4& u, const Tensor4& statistics, const Tensor4& ln_w,
                    const Tensor4& du, const Tensor4& dln_w, const Tensor4& dln_b) {
  return with_type(u.dtype, [&](auto type) {
    return backward_of<decltype(type)>(dy, u, statistics, ln_w, du, dln_w, dln_b);
  });
}

}  // namespace

extern const DwConvLayerNormOps dwconv_layer_norm_ops;
const DwConvLayerNormOps dwconv_layer_norm_ops = {forward, backward_norm};

}  // namespace VOPS_ISA
}  // namespace vops
