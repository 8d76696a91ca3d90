// A task owns all channels of some rows: the norm finds what the convolution computed in the cache.
#include "dwconv_layer_norm.h"
#include "parallel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Multiply-adds that the norm costs per element, about, for for_each_task.
constexpr int64_t kNormWork = 8;
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

// Where dense pixels lie: y or its gradient, u and the statistics, which may all three be null.
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

bool has_planes(const Tensor4& t) { return t.stride[3] == 1 && t.stride[2] == t.size[3]; }

// Asks for the rows of the planes of some channels, while others are computed: the planes are many short streams, which
// processors do not foresee.
void prefetch_planes(const Tensor4& t, int64_t element_bytes, int64_t n, Channels c, RowRange rows) {
  constexpr int64_t kLine = 64;
  for (int64_t k = 0; k < c.count; k++) {
    const int64_t first = n * t.stride[0] + (c.begin + k) * t.stride[1] + rows.begin * t.stride[2];
    const char* p = (const char*)t.data + first * element_bytes;
    for (int64_t i = 0; i < rows.size() * t.stride[2] * element_bytes; i += kLine) __builtin_prefetch(p + i, 0, 2);
  }
}

template <class T>
Error forward_of(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w, const Tensor4& ln_b,
                 const Tensor4& y, const Tensor4& u, const Tensor4& statistics, DwConv f, double eps) {
  typedef typename AccumulatorOf<T>::type A;
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  if (batch * height * width == 0) return nullptr;
  const bool direct = reads_in_place(x, f), planes = has_planes(x);
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
        if (planes && first + together < blocks) {
          prefetch_planes(x, sizeof(T), n, channels_of_blocks(channels, first + together, together), read);
        }
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

// With g = dy * weight and d = (u - mean) * rstd: du = rstd * (g - mean(g) - d * mean(g * d)), into a panel of all
// blocks; what it has in lanes without a channel has no meaning. Adds dy * d and dy to the panels of `sums`,
// [block][2][lane], unless it is null.
template <class T, class A>
void normalize_backward(const Norm<A>& norm, const Normalized<const T, const A>& in, int count, A* du,
                        int64_t block_step, A* sums) {
  A mean[kLanes] = {}, rstd[kLanes] = {}, mean_g[kLanes], slope[kLanes];
  memcpy(mean, in.mean, count * sizeof(A));
  memcpy(rstd, in.rstd, count * sizeof(A));
  Vec<A> of_g[kLanes] = {}, of_gd[kLanes] = {};
  for (int p = 0; p < count; p++) {
    Vec<A> sum_g = {}, sum_gd = {};  // in registers
    for_each_block(norm, [&](int64_t b, int n) {
      const int64_t at = p * norm.channels + b * kLanes;
      const Vec<A> g = load_channels(in.y + at, n) * load(norm.weight + b * kLanes);
      sum_g += g;
      sum_gd += g * (load_channels(in.u + at, n) - mean[p]);
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
      const int64_t at = p * norm.channels + b * kLanes;
      const Vec<A> grad = load_channels(in.y + at, n), d = (load_channels(in.u + at, n) - mean[p]) * rstd[p];
      dweight += grad * d;
      dbias += grad;
      store(du + b * block_step + p * kLanes, (grad * weight - mean_g[p] - d * slope[p]) * rstd[p]);
    }
    if (!sums) return;
    A* to = sums + b * 2 * kLanes;
    store(to, load(to) + dweight);
    store(to + kLanes, load(to + kLanes) + dbias);
  });
}

// Rows overlap by the reach of the convolution, whose gradients read du from the cache: it is never written to memory.
template <class T>
Error backward_of(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& ln_w, const Tensor4& u,
                  const Tensor4& statistics, const DwConvLayerNormGrads& grads, DwConv f) {
  typedef typename AccumulatorOf<T>::type A;
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  const bool want_weights = grads.weight.data || grads.bias.data;
  const bool direct_x = reads_in_place(x, f), direct_dx = grads.dx.data && reads_in_place(grads.dx, f);
  const int64_t taps = f.kernel * f.kernel, halo = f.kernel - 1, row = max64(width, 1) * kLanes;
  const int64_t blocks = ceil_div(channels, kLanes), padded = blocks * kLanes;
  const int64_t together = min64(blocks, is_channels_last(x) ? kTogether : 1);
  const Cut cut = cut_work(max64(batch, 1), 1, max64(height, 1), max64(width, 1), (blocks + together) * row * sizeof(A),
                           halo, kFixedTasks);
  const int64_t units = batch * cut.chunks, splits = clamp64(units, 1, kFixedTasks);

  const Channels all = {0, channels};
  const int64_t weight_elements = (taps + 1) * kLanes;
  A* memory = (A*)thread_scratch(
      kSums, blocks * (weight_elements + kLanes + splits * (weight_elements + 2 * kLanes)) * sizeof(A));
  if (!memory) return kOutOfMemory;
  A* ln_weight = memory + blocks * weight_elements;
  const WeightSums<A> sums = {ln_weight + padded, splits, taps + 1};
  // A panel of these is a block's gradient of the weight of the norm and that of its bias.
  const WeightSums<A> norm_sums = {sums.data + blocks * splits * weight_elements, splits, 2};
  pack_weight(w, all, memory, weight_elements);
  for (int64_t b = 0; b < blocks; b++) {
    reverse_taps(memory + b * weight_elements, taps);
    memset(memory + b * weight_elements + taps * kLanes, 0, kLanes * sizeof(A));
  }
  pack_weight(ln_w, all, ln_weight, kLanes);
  const Weights<A> reversed = {memory, memory + taps * kLanes, weight_elements};
  const Norm<A> norm = norm_of<A>(ln_weight, nullptr, channels, 0);
  const A* means = (const A*)statistics.data;
  const Normalized<const T, const A> whole = {(const T*)dy.data, (const T*)u.data, means,
                                              means + batch * height * width};
  // As many pixels at a time as the first-level cache holds, dy and u.
  const int64_t most = clamp64(4096 / channels, 2, kLanes);

  const int64_t source_elements = min64(height, cut.rows + halo) * row;
  const int64_t group_rows = clamp64(128 / max64(width, 1), 2, cut.rows), out_elements = group_rows * row;
  const int64_t elements =
      blocks * source_elements + together * (source_elements + out_elements) + weight_elements + 2 * padded;
  const int64_t work = 2 * batch * channels * height * width * (taps + kNormWork);
  const Error error = for_each_task<A>(splits, work, elements, [&](int64_t split, A* scratch) {
    A *du_data = scratch, *x_data = du_data + blocks * source_elements, *out_data = x_data + together * source_elements;
    A *unit_sums = out_data + together * out_elements, *own_norm_sums = unit_sums + weight_elements;
    memset(own_norm_sums, 0, 2 * padded * sizeof(A));
    for (int64_t b = 0; b < blocks; b++) memset(sums.panel(b, split), 0, weight_elements * sizeof(A));

    for (int64_t unit = split * units / splits; unit < (split + 1) * units / splits; unit++) {
      const int64_t n = unit / cut.chunks;
      const RowRange rows = cut.rows_of(unit % cut.chunks, height), read = input_rows(rows, height, f);
      const Panel<A> du = packed_panel(du_data, read.begin, width, source_elements);
      auto backward_rows = [&](int64_t begin, int64_t end, A* to) {
        const int64_t first = (n * height + begin) * width, pixels = (end - begin) * width;
        for (int64_t p = 0; p < pixels; p += most) {
          normalize_backward(norm, whole.at(first + p, channels), (int)min64(most, pixels - p),
                             du.at(begin, 0) + p * kLanes, source_elements, to);
        }
      };
      backward_rows(read.begin, rows.begin, nullptr);
      backward_rows(rows.begin, rows.end, own_norm_sums);
      backward_rows(rows.end, read.end, nullptr);

      for (int64_t first = 0; first < blocks; first += together) {
        const Channels c = channels_of_blocks(channels, first, together);
        if (direct_dx) {
          if constexpr (sizeof(T) == sizeof(float)) {
            conv_rows(as_const(du.block(first)), height, reversed.block(first), c.blocks(), f, rows,
                      tensor_panel<T>(grads.dx, n, c.begin));
          }
        }
        for (int64_t i = rows.begin; grads.dx.data && !direct_dx && i < rows.end; i += group_rows) {
          const RowRange now = {i, min64(i + group_rows, rows.end)};
          const Panel<A> out = packed_panel(out_data, i, width, out_elements);
          for (int64_t b = 0; b < c.blocks(); b++) {
            conv_rows(as_const(du.block(first + b)), height, reversed.block(first + b), 1, f, now, out.block(b));
          }
          unpack_rows<A>(out_data, out_elements, grads.dx, n, c, now.begin, now.end);
        }
        if (!want_weights) continue;
        Panel<const A> in = packed_panel<const A>(x_data, read.begin, width, source_elements);
        if (!direct_x) pack_rows(x, n, c, read.begin, read.end, x_data, source_elements);
        if constexpr (sizeof(T) == sizeof(float)) {
          if (direct_x) in = tensor_panel<const T>(x, n, c.begin);
        }
        for (int64_t b = 0; b < c.blocks(); b++) {
          // Summed apart from the other units: shorter sums, smaller rounding errors.
          memset(unit_sums, 0, weight_elements * sizeof(A));
          conv_weight_rows(as_const(du.block(first + b)), in.block(b), height, 1, f, rows, unit_sums, 0);
          add_panel(sums.panel(first + b, split), unit_sums, taps + 1);
        }
      }
    }
    for (int64_t b = 0; b < blocks; b++) {
      memcpy(norm_sums.panel(b, split), own_norm_sums + b * 2 * kLanes, 2 * kLanes * sizeof(A));
    }
  });
  if (error) return error;
  for (int64_t b = 0; b < blocks; b++) {
    const Channels c = channels_of_blocks(channels, b, 1);
    add_splits(norm_sums, 1, b, c, grads.ln_weight, grads.ln_bias);
    if (want_weights) add_splits(sums, taps, b, c, grads.weight, grads.bias);
  }
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
  return with_type(
      x.dtype, [&](auto type) { return forward_of<decltype(type)>(x, w, b, ln_w, ln_b, y, u, statistics, conv, eps); });
}
Error backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& ln_w, const Tensor4& u,
               const Tensor4& statistics, const DwConvLayerNormGrads& grads, DwConv conv) {
  return with_type(x.dtype,
                   [&](auto type) { return backward_of<decltype(type)>(dy, x, w, ln_w, u, statistics, grads, conv); });
}

}  // namespace

extern const DwConvLayerNormOps dwconv_layer_norm_ops;
const DwConvLayerNormOps dwconv_layer_norm_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
