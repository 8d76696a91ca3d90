#include "parallel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// x -> y through the convolution, or through its transpose, with the epilogues that a pass may have.
struct Pass {
  Tensor4 x, w, b, y;
  DwConv conv;
  bool transposed;
  Activation act;
  Tensor4 dy;  // present: y = dy * act'(.), else y = act(.)
};

// With stride 1 the transpose is the convolution with the taps reversed.
bool is_reversed(const Pass& p) { return p.transposed && p.conv.stride == 1; }
DwConv effective_conv(const Pass& p) {
  if (!is_reversed(p)) return p.conv;
  const int64_t reach = p.conv.dilation * (p.conv.kernel - 1);
  return {p.conv.kernel, 1, p.conv.dilation, reach - p.conv.pad_top, reach - p.conv.pad_left};
}

// The kernels work on channels_last tensors of whole blocks in place where there is too little arithmetic to hide
// packing behind.
bool in_place(const Tensor4& a, const Tensor4& b, const DwConv& f) {
  auto fits = [](const Tensor4& t) { return is_channels_last(t) && t.size[1] % kLanes == 0 && t.dtype != kFloat64; };
  return fits(a) && fits(b) && f.kernel == 3 && f.stride <= 2 && (f.stride == 1 || f.dilation == 1);
}

int64_t blocks_together(const Tensor4& a, const Tensor4& b, bool direct) {
  const int64_t most = direct ? kDirectBlocks : is_channels_last(a) && is_channels_last(b) ? kPackedBlocks : 1;
  return min64(ceil_div(a.size[1], kLanes), most);
}

template <class A>
Error run(const Pass& p) {
  const DwConv f = effective_conv(p);
  const bool scatter = p.transposed && !is_reversed(p);
  const int64_t batch = p.y.size[0], channels = p.y.size[1], height = p.y.size[2], width = p.y.size[3];
  const int64_t in_height = p.x.size[2], in_width = p.x.size[3];
  if (batch * channels * height * width == 0) return nullptr;
  auto source = [&](RowRange rows) {
    return scatter ? output_rows(rows, in_height, f) : input_rows(rows, in_height, f);
  };

  const bool direct = in_place(p.x, p.y, f) && (!p.dy.data || is_channels_last(p.dy));
  const int64_t taps = f.kernel * f.kernel, halo = (f.kernel - 1) * f.dilation, weight_elements = (taps + 1) * kLanes;
  const int64_t blocks = ceil_div(channels, kLanes), together = blocks_together(p.x, p.y, direct);
  const int64_t bundles = ceil_div(blocks, together);
  const int64_t row_elements = kLanes * max64(1, scatter ? in_width / f.stride : in_width * f.stride);
  const int64_t row_bytes = direct ? 1 : together * row_elements * sizeof(A);  // of panels
  const Cut cut = cut_work(batch, bundles, height, width, row_bytes, halo, tasks_for_threads());
  // A few rows are computed and stored while what they read and write is in the first-level cache.
  const int64_t group_rows = clamp64(128 / width, 2, cut.rows);
  const int64_t source_rows =
      min64(in_height, scatter ? (cut.rows + halo) / f.stride + 2 : (cut.rows - 1) * f.stride + halo + 1);
  const int64_t group_elements = group_rows * width * kLanes, source_elements = source_rows * in_width * kLanes;

  const int64_t tasks = bundles * cut.groups * cut.chunks, work = batch * channels * height * width * taps;
  const int64_t elements = together * (weight_elements + (direct ? 0 : source_elements + 2 * group_elements));
  return for_each_task<A>(tasks, work, elements, [&](int64_t task, A* scratch) {
    const int64_t chunk = task % cut.chunks, group = task / cut.chunks % cut.groups;
    const int64_t bundle = task / cut.chunks / cut.groups;
    const Channels c = channels_of_blocks(channels, bundle * together, together);
    A *weight_data = scratch, *source_data = weight_data + together * weight_elements;
    A *out_data = source_data + together * source_elements, *dy_data = out_data + together * group_elements;
    pack_weight(p.w, c, weight_data, weight_elements);
    pack_bias(p.b, c, weight_data + taps * kLanes, weight_elements);
    if (is_reversed(p)) {
      for (int64_t b = 0; b < c.blocks(); b++) reverse_taps(weight_data + b * weight_elements, taps);
    }
    const Weights<A> weights = {weight_data, weight_data + taps * kLanes, weight_elements};
    const RowRange rows = cut.rows_of(chunk, height), images = cut.images_of(group, batch);
    const int64_t first_row = source(rows).begin;
    for (int64_t n = images.begin; n < images.end; n++) {
      int64_t packed = first_row;
      for (int64_t i = rows.begin; i < rows.end; i += group_rows) {
        const RowRange now = {i, min64(i + group_rows, rows.end)};
        const int64_t needed = source(now).end, pixels = now.size() * width;
        auto convolve = [&](const auto& in, int64_t count, const Weights<A>& w, const auto& out) {
          if (scatter) {
            conv_transposed_rows(in, in_height, w, count, f, now, out);
          } else {
            conv_rows(in, in_height, w, count, f, now, out);
          }
        };
        if (direct) {
          with_type_of_sums<A>(p.x.dtype, [&](auto type) {
            typedef decltype(type) T;
            convolve(tensor_panel<const T>(p.x, n, c.begin), c.blocks(), weights, tensor_panel<T>(p.y, n, c.begin));
          });
          if (p.dy.data) {
            activate_tensor_backward(p.y, p.dy, n, c, now.begin, now.end, p.act);
          } else if (p.act != kNoActivation) {
            activate_tensor(p.y, n, c, now.begin, now.end, p.act);
          }
          continue;
        }
        if (needed > packed) {
          pack_rows(p.x, n, c, packed, needed, source_data + (packed - first_row) * in_width * kLanes, source_elements);
          packed = needed;
        }
        const Panel<const A> in = packed_panel<const A>(source_data, first_row, in_width, source_elements);
        const Panel<A> out = packed_panel(out_data, now.begin, width, group_elements);
        for (int64_t b = 0; b < c.blocks(); b++) convolve(in.block(b), 1, weights.block(b), out.block(b));
        if (p.dy.data) pack_rows(p.dy, n, c, now.begin, now.end, dy_data, group_elements);
        for (int64_t b = 0; b < c.blocks(); b++) {
          if (p.dy.data) {
            activate_backward(out.block(b).data, dy_data + b * group_elements, pixels, p.act);
          } else {
            activate(out.block(b).data, pixels, p.act);
          }
        }
        unpack_rows<A>(out_data, group_elements, p.y, n, c, now.begin, now.end);
      }
    }
  });
}

Error run(const Pass& p) { return p.y.dtype == kFloat64 ? run<double>(p) : run<float>(p); }

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, DwConv conv, Activation act) {
  return run({x, w, b, y, conv, false, act, {}});
}
Error backward_activation(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& du,
                          DwConv conv, Activation act) {
  return run({x, w, b, du, conv, false, act, dy});
}
Error backward_input(const Tensor4& dy, const Tensor4& w, const Tensor4& dx, DwConv conv) {
  return run({dy, w, {}, dx, conv, true, kNoActivation, {}});
}

template <class A>
Error weight_gradient(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db, DwConv f) {
  const int64_t batch = dy.size[0], channels = dy.size[1], height = dy.size[2], width = dy.size[3];
  const int64_t in_height = x.size[2], in_width = x.size[3];
  if (channels == 0) return nullptr;
  const bool direct = dw.data && in_place(dy, x, f);
  const int64_t taps = f.kernel * f.kernel, halo = (f.kernel - 1) * f.dilation;
  const int64_t blocks = ceil_div(channels, kLanes), together = blocks_together(dy, x, direct);
  const int64_t bundles = ceil_div(blocks, together);
  const int64_t row_elements = kLanes * max64(1, in_width * f.stride + width);
  const int64_t row_bytes = direct ? 1 : together * row_elements * sizeof(A);
  const Cut cut = cut_work(max64(batch, 1), bundles, max64(height, 1), max64(width, 1), row_bytes, halo, kFixedTasks);
  const int64_t units = batch * cut.chunks;  // pieces of the sum; a split takes several, in order
  const int64_t splits = clamp64(ceil_div(kFixedTasks, bundles), 1, max64(units, 1));
  const int64_t sums_elements = (taps + 1) * kLanes;
  const PartialSums<A> sums = {(A*)thread_scratch(kSums, blocks * splits * sums_elements * sizeof(A)), splits,
                               taps + 1};
  if (!sums.data) return kOutOfMemory;

  const int64_t source_elements = min64(in_height, (cut.rows - 1) * f.stride + halo + 1) * in_width * kLanes;
  const int64_t grad_elements = cut.rows * width * kLanes;
  const int64_t elements = together * (sums_elements + (direct ? 0 : source_elements + grad_elements));
  const int64_t work = batch * channels * height * width * taps;
  const Error error = for_each_task<A>(bundles * splits, work, elements, [&](int64_t task, A* scratch) {
    const int64_t split = task % splits, first_block = task / splits * together;
    const Channels c = channels_of_blocks(channels, first_block, together);
    A *unit_sums = scratch, *grad_data = unit_sums + together * sums_elements;
    A* source_data = grad_data + together * grad_elements;
    for (int64_t b = 0; b < c.blocks(); b++) memset(sums.panel(first_block + b, split), 0, sums_elements * sizeof(A));
    for (int64_t unit = split * units / splits; unit < (split + 1) * units / splits; unit++) {
      const int64_t n = unit / cut.chunks, count = c.blocks();
      const RowRange rows = cut.rows_of(unit % cut.chunks, height), read = input_rows(rows, in_height, f);
      // Summed apart from the other units: shorter sums, smaller rounding errors.
      memset(unit_sums, 0, count * sums_elements * sizeof(A));
      if (direct) {
        with_type_of_sums<A>(x.dtype, [&](auto type) {
          typedef const decltype(type) T;
          conv_weight_rows(tensor_panel<T>(dy, n, c.begin), tensor_panel<T>(x, n, c.begin), in_height, count, f, rows,
                           unit_sums, sums_elements);
        });
      } else {
        pack_rows(dy, n, c, rows.begin, rows.end, grad_data, grad_elements);
        const Panel<const A> grad = packed_panel<const A>(grad_data, rows.begin, width, grad_elements);
        if (dw.data) {
          pack_rows(x, n, c, read.begin, read.end, source_data, source_elements);
          const Panel<const A> in = packed_panel<const A>(source_data, read.begin, in_width, source_elements);
          conv_weight_rows(grad, in, in_height, count, f, rows, unit_sums, sums_elements);
        } else {
          sum_rows(grad, count, rows, unit_sums + taps * kLanes, sums_elements);
        }
      }
      for (int64_t b = 0; b < count; b++) {
        add_panel(sums.panel(first_block + b, split), unit_sums + b * sums_elements, taps + 1);
      }
    }
  });
  if (error) return error;
  for (int64_t block = 0; block < blocks; block++) {
    add_splits(sums, taps, block, channels_of_blocks(channels, block, 1), dw, db);
  }
  return nullptr;
}

Error backward_weight(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db, DwConv conv) {
  return (dy.dtype == kFloat64 ? weight_gradient<double> : weight_gradient<float>)(dy, x, dw, db, conv);
}

}  // namespace

extern const DwConvOps dwconv_ops;
const DwConvOps dwconv_ops = {forward, backward_activation, backward_input, backward_weight};

}  // namespace VOPS_ISA
}  // namespace vops
