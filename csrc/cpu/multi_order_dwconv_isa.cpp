// Both convolutions of a block of channels run on panels, so that x0 is never written to memory: the backward pass
// computes it again. Chunks of rows overlap by the reach of the convolutions.
#include "multi_order_dwconv.h"
#include "parallel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// The channels that share a second convolution; the first branch has none and passes x0 through.
struct Branch {
  int index;
  int64_t begin, channels, first_block;
  bool has_second() const { return index > 0; }
};

struct Branches {
  Branch branch[3];
  int64_t blocks;
};

// The heaviest branch comes first, so that no thread is left with it at the end.
Branches branches_of(const MultiOrderDwConv& p) {
  const int64_t total = p.weight[0].size[1], c1 = p.weight[1].size[1], c2 = p.weight[2].size[1];
  Branches b = {{{2, total - c2, c2, 0}, {1, total - c1 - c2, c1, 0}, {0, 0, total - c1 - c2, 0}}, 0};
  for (Branch& branch : b.branch) {
    branch.first_block = b.blocks;
    b.blocks += ceil_div(branch.channels, kLanes);
  }
  return b;
}
const Branch& branch_of(const Branches& b, int64_t block) {
  int i = 2;
  while (block < b.branch[i].first_block) i--;
  return b.branch[i];
}

int64_t taps(const DwConv& f) { return f.kernel * f.kernel; }
int64_t max_taps(const MultiOrderDwConv& p) { return max64(taps(p.conv[0]), max64(taps(p.conv[1]), taps(p.conv[2]))); }
int64_t max_second_pad(const MultiOrderDwConv& p) { return max64(p.conv[1].pad_top, p.conv[2].pad_top); }
int64_t mean_taps(const MultiOrderDwConv& p) {
  return taps(p.conv[0]) +
         (p.weight[1].size[1] * taps(p.conv[1]) + p.weight[2].size[1] * taps(p.conv[2])) / p.weight[0].size[1];
}

template <class A>
Error forward(const Tensor4& x, const MultiOrderDwConv& p, const Tensor4& y) {
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  if (batch * channels * height * width == 0) return nullptr;
  const Branches branches = branches_of(p);
  const int64_t pad1 = max_second_pad(p), halo = 2 * (pad1 + p.conv[0].pad_top), row = width * kLanes;
  const Cut cut = cut_work(batch, branches.blocks, height, width, 2 * row * sizeof(A), halo, tasks_for_threads());
  const int64_t group_rows = clamp64(128 / width, 1, cut.rows);
  const int64_t x_elements = min64(height, cut.rows + halo) * row,
                x0_elements = min64(height, cut.rows + 2 * pad1) * row;
  const int64_t weight_elements = (max_taps(p) + 1) * kLanes;
  const int64_t elements = 2 * weight_elements + x_elements + x0_elements + group_rows * row;

  const int64_t tasks = branches.blocks * cut.groups * cut.chunks,
                work = batch * channels * height * width * mean_taps(p);
  return for_each_task<A>(tasks, work, elements, [&](int64_t task, A* scratch) {
    const int64_t chunk = task % cut.chunks, group = task / cut.chunks % cut.groups,
                  block = task / cut.chunks / cut.groups;
    const Branch& branch = branch_of(branches, block);
    const DwConv first = p.conv[0], second = p.conv[branch.index];
    const Channels own = channels_of_blocks(branch.channels, block - branch.first_block, 1);  // within the branch
    const Channels c = {branch.begin + own.begin, own.count};
    A *w0 = scratch, *b0 = w0 + taps(first) * kLanes, *w1 = scratch + weight_elements, *b1 = w1 + taps(second) * kLanes;
    A *x_data = w1 + weight_elements, *x0_data = x_data + x_elements, *out_data = x0_data + x0_elements;
    pack_weight(p.weight[0], c, w0, 0);
    pack_bias(p.bias[0], c, b0, 0);
    if (branch.has_second()) {
      pack_weight(p.weight[branch.index], own, w1, 0);
      pack_bias(p.bias[branch.index], own, b1, 0);
    }
    auto x0_rows = [&](RowRange out) { return branch.has_second() ? input_rows(out, height, second) : out; };

    const RowRange rows = cut.rows_of(chunk, height), images = cut.images_of(group, batch);
    const RowRange x0_all = x0_rows(rows), x_all = input_rows(x0_all, height, first);
    const Panel<A> in = packed_panel(x_data, x_all.begin, width, 0), x0 = packed_panel(x0_data, x0_all.begin, width, 0);
    for (int64_t n = images.begin; n < images.end; n++) {
      int64_t x_done = x_all.begin, x0_done = x0_all.begin;
      for (int64_t i = rows.begin; i < rows.end; i += group_rows) {
        const RowRange now = {i, min64(i + group_rows, rows.end)}, x0_now = {x0_done, x0_rows(now).end};
        if (x0_now.size() > 0) {
          const int64_t x_end = input_rows(x0_now, height, first).end;
          if (x_end > x_done) pack_rows(x, n, c, x_done, x_end, in.at(x_done, 0), 0);
          x_done = max64(x_done, x_end);
          conv_rows(as_const(in), height, Weights<A>{w0, b0, 0}, 1, first, x0_now, x0);
          x0_done = x0_now.end;
        }
        if (branch.has_second()) {
          conv_rows(as_const(x0), height, Weights<A>{w1, b1, 0}, 1, second, now,
                    packed_panel(out_data, now.begin, width, 0));
          unpack_rows<A>(out_data, 0, y, n, c, now.begin, now.end);
        } else {
          unpack_rows<A>(x0.at(now.begin, 0), 0, y, n, c, now.begin, now.end);
        }
      }
    }
  });
}

// Summed apart from the other images and chunks first: shorter sums, smaller rounding errors.
template <class A>
void add_weight_rows(const Panel<A>& dy, const Panel<A>& x, int64_t height, DwConv f, RowRange out, A* sums, A* total) {
  memset(sums, 0, (taps(f) + 1) * kLanes * sizeof(A));
  conv_weight_rows(as_const(dy), as_const(x), height, 1, f, out, sums, 0);
  add_panel(total, sums, taps(f) + 1);
}

template <class A>
Error backward(const Tensor4& dy, const Tensor4& x, const MultiOrderDwConv& p, const MultiOrderDwConvGrads& grads) {
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  const Branches branches = branches_of(p);
  const int64_t pad0 = p.conv[0].pad_top, pad1 = max_second_pad(p), row = width * kLanes;
  const Cut cut = cut_work(max64(batch, 1), branches.blocks, max64(height, 1), max64(width, 1),
                           max64(4 * row * sizeof(A), 1), 2 * (pad0 + pad1), kFixedTasks);
  const int64_t units = batch * cut.chunks,
                splits = clamp64(ceil_div(kFixedTasks, branches.blocks), 1, max64(units, 1));

  const int64_t wide = min64(height, cut.rows + 2 * (pad0 + pad1)) * row;  // rows of x and dy
  const int64_t x0_elements = min64(height, cut.rows + 2 * pad1) * row,
                dx0_elements = min64(height, cut.rows + 2 * pad0) * row;
  const int64_t group_rows = clamp64(128 / max64(width, 1), 1, cut.rows);
  const int64_t weight_elements = (max_taps(p) + 1) * kLanes;
  const int64_t elements = 4 * weight_elements + 2 * wide + x0_elements + dx0_elements + group_rows * row;

  const int64_t sums_elements = branches.blocks * splits * weight_elements;
  A* memory = (A*)thread_scratch(kSums, 2 * sums_elements * sizeof(A));
  if (!memory) return kOutOfMemory;
  const PartialSums<A> sums0 = {memory, splits, max_taps(p) + 1};
  const PartialSums<A> sums1 = {sums0.data + sums_elements, splits, max_taps(p) + 1};

  const int64_t work = 2 * batch * channels * height * width * mean_taps(p);
  const Error error = for_each_task<A>(branches.blocks * splits, work, elements, [&](int64_t task, A* scratch) {
    const int64_t split = task % splits, block = task / splits;
    const Branch& branch = branch_of(branches, block);
    const DwConv first = p.conv[0], second = p.conv[branch.index];
    const Channels own = channels_of_blocks(branch.channels, block - branch.first_block, 1);
    const Channels c = {branch.begin + own.begin, own.count};
    const bool want_second = branch.has_second() && (grads.weight[branch.index].data || grads.bias[branch.index].data);
    const bool want_first = grads.weight[0].data || grads.bias[0].data;
    A *w0 = scratch, *b0 = w0 + taps(first) * kLanes, *w0_reversed = scratch + weight_elements;
    A *w1_reversed = w0_reversed + weight_elements, *unit_sums = w1_reversed + weight_elements;
    A *dy_data = unit_sums + weight_elements, *x_data = dy_data + wide;
    A *x0_data = x_data + wide, *dx0_data = x0_data + x0_elements, *dx_data = dx0_data + dx0_elements;
    pack_weight(p.weight[0], c, w0, 0);
    pack_bias(p.bias[0], c, b0, 0);
    memcpy(w0_reversed, w0, taps(first) * kLanes * sizeof(A));
    reverse_taps(w0_reversed, taps(first));
    if (branch.has_second()) {
      pack_weight(p.weight[branch.index], own, w1_reversed, 0);
      reverse_taps(w1_reversed, taps(second));
    }
    A zero[kLanes] = {};
    A *total0 = sums0.panel(block, split), *total1 = sums1.panel(block, split);
    memset(total0, 0, weight_elements * sizeof(A));
    memset(total1, 0, weight_elements * sizeof(A));

    for (int64_t unit = split * units / splits; unit < (split + 1) * units / splits; unit++) {
      const int64_t n = unit / cut.chunks;
      const RowRange rows = cut.rows_of(unit % cut.chunks, height), dx0_rows = input_rows(rows, height, first);
      const RowRange dy_rows = branch.has_second() ? input_rows(dx0_rows, height, second) : dx0_rows;
      const Panel<A> grad = packed_panel(dy_data, dy_rows.begin, width, 0);
      pack_rows(dy, n, c, dy_rows.begin, dy_rows.end, grad.data, 0);
      Panel<A> dx0 = grad;
      if (branch.has_second() && (want_first || grads.dx.data)) {
        dx0 = packed_panel(dx0_data, dx0_rows.begin, width, 0);
        conv_rows(as_const(grad), height, Weights<A>{w1_reversed, zero, 0}, 1, second, dx0_rows, dx0);
      }
      if (grads.dx.data) {
        for (int64_t i = rows.begin; i < rows.end; i += group_rows) {
          const RowRange now = {i, min64(i + group_rows, rows.end)};
          const Panel<A> out = packed_panel(dx_data, now.begin, width, 0);
          conv_rows(as_const(dx0), height, Weights<A>{w0_reversed, zero, 0}, 1, first, now, out);
          unpack_rows<A>(dx_data, 0, grads.dx, n, c, now.begin, now.end);
        }
      }
      if (!want_first && !want_second) continue;
      const RowRange x0_rows = want_second ? input_rows(rows, height, second) : rows,
                     x_rows = input_rows(x0_rows, height, first);
      const Panel<A> in = packed_panel(x_data, x_rows.begin, width, 0);
      pack_rows(x, n, c, x_rows.begin, x_rows.end, in.data, 0);
      if (want_first) {
        add_weight_rows(dx0, in, height, first, rows, unit_sums, total0);
      }
      if (want_second) {
        const Panel<A> x0 = packed_panel(x0_data, x0_rows.begin, width, 0);
        conv_rows(as_const(in), height, Weights<A>{w0, b0, 0}, 1, first, x0_rows, x0);
        add_weight_rows(grad, x0, height, second, rows, unit_sums, total1);
      }
    }
  });
  if (error) return error;

  for (int64_t block = 0; block < branches.blocks; block++) {
    const Branch& branch = branch_of(branches, block);
    const Channels own = channels_of_blocks(branch.channels, block - branch.first_block, 1);
    add_splits(sums0, taps(p.conv[0]), block, {branch.begin + own.begin, own.count}, grads.weight[0], grads.bias[0]);
    if (!branch.has_second()) continue;
    add_splits(sums1, taps(p.conv[branch.index]), block, own, grads.weight[branch.index], grads.bias[branch.index]);
  }
  return nullptr;
}

Error dispatch_forward(const Tensor4& x, const MultiOrderDwConv& p, const Tensor4& y) {
  return (x.dtype == kFloat64 ? forward<double> : forward<float>)(x, p, y);
}
Error dispatch_backward(const Tensor4& dy, const Tensor4& x, const MultiOrderDwConv& p,
                        const MultiOrderDwConvGrads& grads) {
  return (x.dtype == kFloat64 ? backward<double> : backward<float>)(dy, x, p, grads);
}

}  // namespace

extern const MultiOrderDwConvOps multi_order_dwconv_ops;
const MultiOrderDwConvOps multi_order_dwconv_ops = {dispatch_forward, dispatch_backward};

}  // namespace VOPS_ISA
}  // namespace vops
