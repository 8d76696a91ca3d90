// A task owns all channels of some rows: the norm finds what the convolution computed in the cache.
#include "dwconv_layer_norm.h"
#include "layer_norm_panel.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// Multiply-adds that the norm costs per element, about, for for_each_task.
constexpr int64_t kNormWork = 8;

// Kernel 3 has too little arithmetic to hide packing behind.
bool reads_in_place(const Tensor4& x, const DwConv& f) {
  return x.dtype == kFloat32 && f.kernel == 3 && is_channels_last(x) && x.size[1] % kLanes == 0;
}

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
                 const Tensor4& y, const Tensor4& statistics, DwConv f, double eps) {
  typedef SumOf<T> A;
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  if (batch * height * width == 0) return nullptr;
  const bool direct = reads_in_place(x, f), planes = has_planes(x);
  const int64_t taps = f.kernel * f.kernel, halo = f.kernel - 1, row = width * kLanes;
  const int64_t blocks = ceil_div(channels, kLanes), together = min64(blocks, is_channels_last(x) ? kPackedBlocks : 1);
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
  const PanelNorm<A> norm = norm_of<A>(ln_weight, ln_bias, channels, eps);
  A* means = (A*)statistics.data;
  const Normalized<T, A> whole = {(T*)y.data, means, means ? means + batch * height * width : nullptr};

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

// u is computed again rather than kept: that costs less than writing and reading it where the kernel is small, and
// halves what a training step keeps. A task marches down the images: of x and du it holds the rows that the
// convolutions of a unit, some rows, read, and computes each once but where it starts. Units, and the sums they add to,
// depend on the shape only.
template <class T>
Error backward_of(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w,
                  const Tensor4& statistics, const DwConvLayerNormGrads& grads, DwConv f) {
  typedef SumOf<T> A;
  const int64_t batch = x.size[0], channels = x.size[1], height = x.size[2], width = x.size[3];
  const bool want_weights = grads.weight.data || grads.bias.data, planes = has_planes(x);
  const int64_t taps = f.kernel * f.kernel, halo = f.kernel - 1, row = max64(width, 1) * kLanes;
  const int64_t blocks = ceil_div(channels, kLanes);
  const int64_t together = min64(blocks, is_channels_last(x) ? kPackedBlocks : 1);
  const Cut cut =
      cut_work(max64(batch, 1), 1, max64(height, 1), max64(width, 1), 2 * blocks * row * sizeof(A), halo, kFixedTasks);
  const int64_t units = batch * cut.chunks, splits = clamp64(units, 1, kFixedTasks);
  const int64_t tasks = min64(splits, tasks_for_threads());

  const Channels all = {0, channels};
  const int64_t weight_elements = (taps + 1) * kLanes;
  A* memory = (A*)thread_scratch(
      kSums, blocks * (2 * weight_elements + kLanes + splits * (weight_elements + 2 * kLanes)) * sizeof(A));
  if (!memory) return kOutOfMemory;
  A *reversed_data = memory + blocks * weight_elements, *ln_weight = reversed_data + blocks * weight_elements;
  const PartialSums<A> sums = {ln_weight + blocks * kLanes, splits, taps + 1};
  // A panel of these is a block's gradient of the weight of the norm and that of its bias.
  const PartialSums<A> norm_sums = {sums.data + blocks * splits * weight_elements, splits, 2};
  memset(sums.data, 0, blocks * splits * (weight_elements + 2 * kLanes) * sizeof(A));
  pack_weight(w, all, memory, weight_elements);
  pack_bias(b, all, memory + taps * kLanes, weight_elements);
  memcpy(reversed_data, memory, blocks * weight_elements * sizeof(A));
  for (int64_t i = 0; i < blocks; i++) {
    reverse_taps(reversed_data + i * weight_elements, taps);
    memset(reversed_data + i * weight_elements + taps * kLanes, 0, kLanes * sizeof(A));
  }
  pack_weight(ln_w, all, ln_weight, kLanes);
  const Weights<A> weights = {memory, memory + taps * kLanes, weight_elements};
  const Weights<A> reversed = {reversed_data, reversed_data + taps * kLanes, weight_elements};
  const PanelNorm<A> norm = norm_of<A>(ln_weight, nullptr, channels, 0);
  const A* means = (const A*)statistics.data;
  const Normalized<const T, const A> whole = {(const T*)dy.data, means, means + batch * height * width};
  // As many pixels at a time as the first-level cache holds, dy and u.
  const int64_t most = clamp64(4096 / channels, 2, kLanes);

  // Rows that a unit in the middle of an image reads, twice, so that rows seldom move.
  const int64_t capacity = min64(height, 2 * (cut.rows + 2 * halo)), panel_elements = capacity * row;
  const int64_t group_rows = clamp64(128 / max64(width, 1), 2, cut.rows), out_elements = group_rows * row;
  const int64_t elements = 2 * blocks * panel_elements + together * out_elements + weight_elements;
  const int64_t work = batch * channels * height * width * (3 * taps + kNormWork);
  const Error error = for_each_task<A>(tasks, work, elements, [&](int64_t task, A* scratch) {
    A *x_data = scratch, *du_data = x_data + blocks * panel_elements, *out_data = du_data + blocks * panel_elements;
    A* unit_sums = out_data + together * out_elements;
    auto first_unit = [&](int64_t split) { return split * units / splits; };
    auto split_of = [&](int64_t unit) { return ceil_div((unit + 1) * splits, units) - 1; };
    const int64_t begin = first_unit(task * splits / tasks), end = first_unit((task + 1) * splits / tasks);

    int64_t first_row = 0, x_end = 0, du_end = 0;  // panels hold the rows [first_row, end)
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t n = unit / cut.chunks, chunk = unit % cut.chunks;
      const RowRange rows = cut.rows_of(chunk, height), read = input_rows(rows, height, f);
      const RowRange source = input_rows(read, height, f);
      if (unit == begin || chunk == 0) {
        first_row = x_end = source.begin;
        du_end = read.begin;
      } else if (source.end - first_row > capacity) {
        for (int64_t i = 0; i < 2 * blocks; i++) {
          A* panel = scratch + i * panel_elements;
          memmove(panel, panel + (read.begin - first_row) * row, (x_end - read.begin) * row * sizeof(A));
        }
        first_row = read.begin;
      }
      const Panel<A> in = packed_panel(x_data, first_row, width, panel_elements);
      const Panel<A> du = packed_panel(du_data, first_row, width, panel_elements);
      for (int64_t first = 0; first < blocks; first += together) {
        const Channels c = channels_of_blocks(channels, first, together);
        pack_rows(x, n, c, x_end, source.end, in.block(first).at(x_end, 0), panel_elements);
        if (planes && first + together < blocks) {
          prefetch_planes(x, sizeof(T), n, channels_of_blocks(channels, first + together, together),
                          {x_end, source.end});
        }
        for (int64_t i = first; i < first + c.blocks(); i++) {
          conv_rows(as_const(in.block(i)), height, weights.block(i), 1, f, {du_end, read.end}, du.block(i));
        }
      }
      x_end = source.end;
      // Row by row, so that what is added, and in which order, does not depend on where the task starts.
      for (; du_end < read.end; du_end++) {
        const int64_t owner = n * cut.chunks + du_end / cut.rows, first = (n * height + du_end) * width;
        A* to = owner >= begin && owner < end ? norm_sums.panel(0, split_of(owner)) : nullptr;
        for (int64_t p = 0; p < width; p += most) {
          normalize_backward(norm, whole.at(first + p, channels), (int)min64(most, width - p), du.at(du_end, p),
                             panel_elements, to, splits * 2 * kLanes);
        }
      }

      for (int64_t first = 0; first < blocks; first += together) {
        const Channels c = channels_of_blocks(channels, first, together);
        for (int64_t i = rows.begin; grads.dx.data && i < rows.end; i += group_rows) {
          const RowRange now = {i, min64(i + group_rows, rows.end)};
          const Panel<A> out = packed_panel(out_data, i, width, out_elements);
          for (int64_t k = 0; k < c.blocks(); k++) {
            conv_rows(as_const(du.block(first + k)), height, reversed.block(first + k), 1, f, now, out.block(k));
          }
          unpack_rows<A>(out_data, out_elements, grads.dx, n, c, now.begin, now.end);
        }
        for (int64_t i = first; want_weights && i < first + c.blocks(); i++) {
          // Summed apart from the other units: shorter sums, smaller rounding errors.
          memset(unit_sums, 0, weight_elements * sizeof(A));
          conv_weight_rows(as_const(du.block(i)), as_const(in.block(i)), height, 1, f, rows, unit_sums, 0);
          add_panel(sums.panel(i, split_of(unit)), unit_sums, taps + 1);
        }
      }
    }
  });
  if (error) return error;
  for (int64_t i = 0; i < blocks; i++) {
    const Channels c = channels_of_blocks(channels, i, 1);
    add_splits(norm_sums, 1, i, c, grads.ln_weight, grads.ln_bias);
    if (want_weights) add_splits(sums, taps, i, c, grads.weight, grads.bias);
  }
  return nullptr;
}

Error forward(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w, const Tensor4& ln_b,
              const Tensor4& y, const Tensor4& statistics, DwConv conv, double eps) {
  return with_type(
      x.dtype, [&](auto type) { return forward_of<decltype(type)>(x, w, b, ln_w, ln_b, y, statistics, conv, eps); });
}
Error backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w,
               const Tensor4& statistics, const DwConvLayerNormGrads& grads, DwConv conv) {
  return with_type(x.dtype,
                   [&](auto type) { return backward_of<decltype(type)>(dy, x, w, b, ln_w, statistics, grads, conv); });
}

}  // namespace

extern const DwConvLayerNormOps dwconv_layer_norm_ops;
const DwConvLayerNormOps dwconv_layer_norm_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
