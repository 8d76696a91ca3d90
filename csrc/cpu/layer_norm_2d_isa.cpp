// Two kernels: one with channels in the lanes, and one with pixels in the lanes. Both read a pixel's channels up to
// three times and from memory once: what they work on at a time stays in the caches.
#include "layer_norm_2d.h"
#include "layer_norm_planes.h"
#include "layer_norm_rows.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Multiply-adds that an element costs, about, for for_each_task.
constexpr int64_t kNormWork = 8;

// Which kernel: in place, or on packed panels.
enum Way { kChannels, kPlanes, kPacked };

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

// Calls f(a number of the type of x, one of that of y): the same, or a half type beside float32.
template <class F>
VOPS_INLINE void with_types(const Tensor4& x, const Tensor4& y, const F& f) {
  if (x.dtype == y.dtype) return with_type_of_sums<float>(x.dtype, [&](auto type) { f(type, type); });
  y.dtype == kBFloat16 ? f(float(), bf16()) : f(float(), f16());
}

// Rows of images, cut so that a task's packed panels fit the cache; where the way is kPlanes, a row is a tile.
struct Work {
  Way way;
  int64_t channels, batch, height, width;
  Cut cut;
  int64_t tasks() const { return cut.groups * cut.chunks; }
  int64_t elements() const { return channels * batch * height * width; }
  int64_t panel_elements() const { return padded(channels) * cut.rows * width; }
};
Work cut_norm(Way way, const Tensor4& x, int64_t element_bytes, int64_t tensors, int64_t tasks) {
  Work w = {way, x.size[1], x.size[0], x.size[2], x.size[3], {}};
  const int64_t batch = max64(w.batch, 1), tile = kTile * kLanes;
  const int64_t row_bytes = way == kPacked ? padded(w.channels) * w.width * tensors * element_bytes : 1;
  w.cut = way == kPlanes ? cut_work(batch, 1, ceil_div(w.height * w.width, tile), tile, row_bytes, 0, tasks)
                         : cut_work(batch, 1, w.height, w.width, row_bytes, 0, tasks);
  return w;
}

// Calls f(image, rows) for the rows of a task, or the pixels where the way is kPlanes.
template <class F>
VOPS_INLINE void for_each_piece(const Work& w, int64_t task, const F& f) {
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

template <class A>
Error run_forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, double eps) {
  const Way way = way_of(x, y, {});
  const Work work = cut_norm(way, x, sizeof(A), 1, tasks_for_threads());
  const Channels channels = {0, work.channels};
  const int64_t width = padded(work.channels);
  const int64_t own = way == kPlanes ? work.channels * kTile * kLanes : way == kPacked ? work.panel_elements() : 0;
  const int64_t elements = 2 * width + own;
  return for_each_task<A>(work.tasks(), work.elements() * kNormWork, elements, [&](int64_t task, A* scratch) {
    A *weight = scratch, *bias = weight + width, *tile = bias + width;
    pack_weight(w, channels, weight, kLanes);
    pack_bias(b, channels, bias, kLanes);
    const Norm<A> norm = {weight, bias, work.channels, eps};
    for_each_piece(work, task, [&](int64_t n, RowRange part) {
      if (way == kPacked) {
        const int64_t block_step = part.size() * work.width * kLanes;
        pack_rows(x, n, channels, part.begin, part.end, tile, block_step);
        const Panel<A> panel = packed_panel(tile, part.begin, work.width, block_step);
        const Panel<const A> in = packed_panel<const A>(tile, part.begin, work.width, block_step);
        forward_channels<A, A, A>(norm, in, panel, part);
        unpack_rows<A>(tile, block_step, y, n, channels, part.begin, part.end);
      } else if constexpr (sizeof(A) == sizeof(float)) {
        with_types(x, y, [&](auto in, auto out) {
          typedef decltype(in) T;
          typedef decltype(out) Out;
          if (way == kChannels) {
            return forward_channels<T, Out, A>(norm, tensor_panel<const T>(x, n, 0), tensor_panel<Out>(y, n, 0), part);
          }
          for_each_tile(part.begin, part.end, [&](int64_t p, int count, auto vectors, auto full) {
            forward_tile<T, Out, decltype(vectors)::value, decltype(full)::value>(norm, planes<const T>(x, n, p),
                                                                                  planes<Out>(y, n, p), count, tile);
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
  const int64_t width = padded(work.channels), blocks = width / kLanes, splits = min64(work.tasks(), kFixedTasks);
  const bool sum = dw.data || db.data;
  // A panel of the sums is a block's gradient of the weight and that of the bias.
  const PartialSums<A> sums = {sum ? (A*)thread_scratch(kSums, 2 * width * splits * sizeof(A)) : nullptr, splits, 2};
  if (sum && !sums.data) return kOutOfMemory;
  const int64_t lanes = way == kPlanes ? 2 * work.channels * kLanes : 2 * width;
  const int64_t own = way == kPlanes   ? 2 * work.channels * kTile * kLanes
                      : way == kPacked ? 2 * work.panel_elements()
                                       : 0;
  const int64_t elements = width + lanes + own;
  const int64_t amount = 2 * work.elements() * kNormWork;
  const Error error = for_each_task<A>(splits, amount, elements, [&](int64_t split, A* scratch) {
    A *weight = scratch, *own_sums = weight + width, *tile = own_sums + lanes;
    pack_weight(w, channels, weight, kLanes);
    const Norm<A> norm = {weight, nullptr, work.channels, eps};
    if (sum) memset(own_sums, 0, lanes * sizeof(A));
    A* to = sum ? own_sums : nullptr;
    for (int64_t task = split * work.tasks() / splits; task < (split + 1) * work.tasks() / splits; task++) {
      for_each_piece(work, task, [&](int64_t n, RowRange part) {
        if (way == kPacked) {
          const int64_t block_step = part.size() * work.width * kLanes;
          A* grads = tile + width * part.size() * work.width;
          pack_rows(x, n, channels, part.begin, part.end, tile, block_step);
          pack_rows(dy, n, channels, part.begin, part.end, grads, block_step);
          const Panel<const A> in = packed_panel<const A>(tile, part.begin, work.width, block_step);
          const Panel<const A> grad = packed_panel<const A>(grads, part.begin, work.width, block_step);
          const Panel<A> out = packed_panel(tile, part.begin, work.width, block_step);
          backward_channels<A, A, A>(norm, grad, in, &out, to, part);
          if (dx.data) unpack_rows<A>(tile, block_step, dx, n, channels, part.begin, part.end);
        } else if constexpr (sizeof(A) == sizeof(float)) {
          with_types(x, dy, [&](auto in, auto of_y) {
            typedef decltype(in) T;
            typedef decltype(of_y) Grad;
            if (way == kChannels) {
              const Panel<T> out = dx.data ? tensor_panel<T>(dx, n, 0) : Panel<T>{};
              return backward_channels<Grad, T, A>(norm, tensor_panel<const Grad>(dy, n, 0),
                                                   tensor_panel<const T>(x, n, 0), dx.data ? &out : nullptr, to, part);
            }
            for_each_tile(part.begin, part.end, [&](int64_t p, int count, auto vectors, auto full) {
              backward_tile<Grad, T, decltype(vectors)::value, decltype(full)::value>(
                  norm, planes<const Grad>(dy, n, p), planes<const T>(x, n, p), planes<T>(dx, n, p), count, to, tile);
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
