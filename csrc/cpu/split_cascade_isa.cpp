// The whole chain of a block of channels runs on panels: what one level hands to the next is never written to memory,
// and the backward pass computes it again. Chunks of rows overlap by one row for every level.
#include "parallel.h"
#include "split_cascade.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Sizes that both passes share.
struct Sizes {
  int64_t batch, height, width, channels, blocks, together, bundles, row, taps, weight_elements;
  int64_t last_channels;
  // The channels of a bundle in split `level`; the last split has fewer and may have none.
  Channels of_level(int64_t bundle, int64_t level, int64_t levels) const {
    const int64_t own = level < levels ? channels : last_channels, begin = bundle * together * kLanes;
    return {level * channels + begin, clamp64(own - begin, 0, together * kLanes)};
  }
};
Sizes sizes_of(const Tensor4& a, const Tensor4& b, const SplitCascade& p) {
  Sizes s;
  s.batch = a.size[0], s.height = a.size[2], s.width = a.size[3];
  s.channels = p.weight[0].size[1];
  s.blocks = ceil_div(s.channels, kLanes);
  s.together = is_channels_last(a) && is_channels_last(b) ? min64(s.blocks, kPackedBlocks) : 1;
  s.bundles = ceil_div(s.blocks, s.together);
  s.row = s.width * kLanes;
  s.taps = p.conv.kernel * p.conv.kernel;
  s.weight_elements = (s.taps + 1) * kLanes;
  s.last_channels = a.size[1] - p.levels * s.channels;
  return s;
}

// `rows` and `reach` more on both sides, where they are.
RowRange widened(RowRange rows, int64_t reach, int64_t height) {
  return {max64(rows.begin - reach, 0), min64(rows.end + reach, height)};
}

// to += from over the rows, which both have.
template <class A>
void add_rows(const Panel<A>& to, const Panel<A>& from, int64_t blocks, RowRange rows) {
  for (int64_t b = 0; b < blocks; b++) {
    add_panel(to.block(b).at(rows.begin, 0), from.block(b).at(rows.begin, 0), rows.size() * to.width);
  }
}

template <class A>
void convolve(const Panel<A>& in, const A* weight, const Sizes& s, int64_t blocks, DwConv f, RowRange rows,
              const Panel<A>& out) {
  const Weights<A> weights = {weight, weight + s.taps * kLanes, s.weight_elements};
  for (int64_t b = 0; b < blocks; b++) {
    conv_rows(as_const(in.block(b)), s.height, weights.block(b), 1, f, rows, out.block(b));
  }
}

// The last split, which passes through.
template <class A>
void copy_last(const Tensor4& from, const Tensor4& to, int64_t n, Channels c, RowRange rows, A* panel, int64_t step) {
  if (c.count == 0) return;
  pack_rows(from, n, c, rows.begin, rows.end, panel, step);
  unpack_rows<A>(panel, step, to, n, c, rows.begin, rows.end);
}

// One level has nothing to keep from memory, and too little arithmetic to hide packing behind.
bool in_place(const Tensor4& x, const Tensor4& y, const SplitCascade& p) {
  return p.levels == 1 && x.dtype == kFloat32 && p.weight[0].size[1] % kLanes == 0 && is_channels_last(x) &&
         is_channels_last(y);
}

template <class A>
Error forward_in(const Tensor4& x, const SplitCascade& p, const Tensor4& y) {
  const Sizes s = sizes_of(x, y, p);
  if (s.batch * s.height * s.width == 0) return nullptr;
  const bool direct = in_place(x, y, p);
  const int64_t pad = p.conv.pad_top, halo = 2 * pad * p.levels, levels = p.levels;
  const Cut cut =
      cut_work(s.batch, s.bundles, s.height, s.width, 2 * s.together * s.row * sizeof(A), halo, tasks_for_threads());
  const int64_t panel_elements = min64(s.height, cut.rows + halo) * s.row;
  const int64_t elements = s.together * (2 * panel_elements + s.weight_elements);
  const int64_t work = s.batch * levels * s.channels * s.height * s.width * s.taps;
  return for_each_task<A>(s.bundles * cut.groups * cut.chunks, work, elements, [&](int64_t task, A* scratch) {
    const int64_t bundle = task / cut.chunks / cut.groups;
    const RowRange rows = cut.rows_of(task % cut.chunks, s.height);
    const RowRange images = cut.images_of(task / cut.chunks % cut.groups, s.batch);
    A *weight = scratch, *in_data = weight + s.together * s.weight_elements;
    A* out_data = in_data + s.together * panel_elements;
    const int64_t first_row = widened(rows, pad * levels, s.height).begin;
    const Panel<A> in = packed_panel(in_data, first_row, s.width, panel_elements);
    const Panel<A> out = packed_panel(out_data, first_row, s.width, panel_elements);
    for (int64_t n = images.begin; n < images.end; n++) {
      for (int64_t i = 0; i < levels; i++) {
        const Channels c = s.of_level(bundle, i, levels), own = {bundle * s.together * kLanes, c.count};
        const RowRange now = widened(rows, pad * (levels - 1 - i), s.height), read = widened(now, pad, s.height);
        pack_weight(p.weight[i], own, weight, s.weight_elements);
        pack_bias(p.bias[i], own, weight + s.taps * kLanes, s.weight_elements);
        if (direct) {
          if constexpr (sizeof(A) == sizeof(float)) {
            const Weights<A> weights = {weight, weight + s.taps * kLanes, s.weight_elements};
            conv_rows(tensor_panel<const A>(x, n, c.begin), s.height, weights, c.blocks(), p.conv, rows,
                      tensor_panel<A>(y, n, c.begin));
          }
          continue;
        }
        pack_rows(x, n, c, read.begin, read.end, in.at(read.begin, 0), panel_elements);
        if (i > 0) add_rows(in, out, c.blocks(), read);
        convolve(in, weight, s, c.blocks(), p.conv, now, out);
        unpack_rows<A>(out.at(rows.begin, 0), panel_elements, y, n, c, rows.begin, rows.end);
      }
      copy_last(x, y, n, s.of_level(bundle, levels, levels), rows, in_data, panel_elements);
    }
  });
}

template <class A>
Error backward_in(const Tensor4& dy, const Tensor4& x, const SplitCascade& p, const SplitCascadeGrads& grads) {
  const Sizes s = sizes_of(dy, x, p);
  const int64_t pad = p.conv.pad_top, halo = 2 * pad * p.levels, levels = p.levels;
  bool want_weights = false;
  for (int64_t i = 0; i < levels; i++) want_weights |= grads.weight[i].data || grads.bias[i].data;
  // The inputs of all convolutions, a gradient of an output and one of an input.
  const int64_t panels = levels + 2;
  const Cut cut = cut_work(max64(s.batch, 1), s.bundles, max64(s.height, 1), max64(s.width, 1),
                           max64(panels * s.together * s.row * sizeof(A), 1), halo, kFixedTasks);
  const int64_t units = s.batch * cut.chunks;
  const int64_t splits = clamp64(ceil_div(kFixedTasks, s.bundles), 1, max64(units, 1));
  const int64_t sums_bytes = levels * s.blocks * splits * s.weight_elements * sizeof(A);
  const PartialSums<A> sums = {(A*)thread_scratch(kSums, sums_bytes), splits, s.taps + 1};
  if (!sums.data) return kOutOfMemory;

  const int64_t panel_elements = min64(s.height, cut.rows + halo) * s.row;
  const int64_t bundle_weights = s.together * s.weight_elements;
  const int64_t elements = s.together * panels * panel_elements + (2 * levels + 1) * bundle_weights;
  const int64_t work = 3 * s.batch * levels * s.channels * s.height * s.width * s.taps;
  const Error error = for_each_task<A>(s.bundles * splits, work, elements, [&](int64_t task, A* scratch) {
    const int64_t split = task % splits, bundle = task / splits, first_block = bundle * s.together;
    A *weights = scratch, *reversed = weights + levels * bundle_weights,
      *unit_sums = reversed + levels * bundle_weights;
    A *in_data = unit_sums + bundle_weights, *dy_data = in_data + levels * s.together * panel_elements;
    A* dx_data = dy_data + s.together * panel_elements;
    const int64_t blocks = s.of_level(bundle, 0, levels).blocks();
    auto total = [&](int64_t level, int64_t b) { return sums.panel(level * s.blocks + first_block + b, split); };
    for (int64_t i = 0; i < levels; i++) {
      const Channels own = {first_block * kLanes, s.of_level(bundle, i, levels).count};
      A *weight = weights + i * bundle_weights, *back = reversed + i * bundle_weights;
      pack_weight(p.weight[i], own, weight, s.weight_elements);
      pack_bias(p.bias[i], own, weight + s.taps * kLanes, s.weight_elements);
      for (int64_t b = 0; b < blocks; b++) {
        A* taps = back + b * s.weight_elements;
        memcpy(taps, weight + b * s.weight_elements, s.taps * kLanes * sizeof(A));
        memset(taps + s.taps * kLanes, 0, kLanes * sizeof(A));
        reverse_taps(taps, s.taps);
        memset(total(i, b), 0, s.weight_elements * sizeof(A));
      }
    }
    for (int64_t unit = split * units / splits; unit < (split + 1) * units / splits; unit++) {
      const int64_t n = unit / cut.chunks;
      const RowRange rows = cut.rows_of(unit % cut.chunks, s.height);
      const int64_t first_row = widened(rows, pad * levels, s.height).begin;
      auto panel = [&](A* data) { return packed_panel(data, first_row, s.width, panel_elements); };
      auto input = [&](int64_t i) { return panel(in_data + i * s.together * panel_elements); };
      const Panel<A> grad = panel(dy_data), dx = panel(dx_data);
      for (int64_t i = 0; want_weights && i < levels; i++) {
        const Channels c = s.of_level(bundle, i, levels);
        const RowRange now = widened(rows, pad * (levels - i), s.height);
        pack_rows(x, n, c, now.begin, now.end, input(i).at(now.begin, 0), panel_elements);
        if (i == 0) continue;
        convolve(input(i - 1), weights + (i - 1) * bundle_weights, s, blocks, p.conv, now, dx);
        add_rows(input(i), dx, blocks, now);
      }
      for (int64_t i = levels - 1; i >= 0; i--) {
        const Channels c = s.of_level(bundle, i, levels);
        const RowRange now = widened(rows, pad * i, s.height), read = widened(now, pad, s.height);
        pack_rows(dy, n, c, read.begin, read.end, grad.at(read.begin, 0), panel_elements);
        if (i < levels - 1) add_rows(grad, dx, blocks, read);
        if (i > 0 || grads.dx.data) convolve(grad, reversed + i * bundle_weights, s, blocks, p.conv, now, dx);
        if (grads.dx.data) {
          unpack_rows<A>(dx.at(rows.begin, 0), panel_elements, grads.dx, n, c, rows.begin, rows.end);
        }
        if (!grads.weight[i].data && !grads.bias[i].data) continue;
        // Summed apart from the other units: shorter sums, smaller rounding errors.
        memset(unit_sums, 0, bundle_weights * sizeof(A));
        conv_weight_rows(as_const(grad), as_const(input(i)), s.height, blocks, p.conv, rows, unit_sums,
                         s.weight_elements);
        for (int64_t b = 0; b < blocks; b++) add_panel(total(i, b), unit_sums + b * s.weight_elements, s.taps + 1);
      }
      if (grads.dx.data) {
        copy_last(dy, grads.dx, n, s.of_level(bundle, levels, levels), rows, dy_data, panel_elements);
      }
    }
  });
  if (error) return error;
  for (int64_t i = 0; i < levels; i++) {
    for (int64_t b = 0; b < s.blocks; b++) {
      add_splits(sums, s.taps, i * s.blocks + b, channels_of_blocks(s.channels, b, 1), grads.weight[i], grads.bias[i]);
    }
  }
  return nullptr;
}

Error forward(const Tensor4& x, const SplitCascade& p, const Tensor4& y) {
  return (x.dtype == kFloat64 ? forward_in<double> : forward_in<float>)(x, p, y);
}
Error backward(const Tensor4& dy, const Tensor4& x, const SplitCascade& p, const SplitCascadeGrads& grads) {
  return (x.dtype == kFloat64 ? backward_in<double> : backward_in<float>)(dy, x, p, grads);
}

}  // namespace

extern const SplitCascadeOps split_cascade_ops;
const SplitCascadeOps split_cascade_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
