#include "channel_aggregation_ffn.h"
#include "gelu.h"
#include "lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

// How the work is cut, by shape only: what is summed over tasks must not depend on the threads. A task takes some
// blocks of channels of some rows of some images.
struct Plan {
  int64_t blocks, together, bundles, taps;
  Cut cut;
  int64_t group_rows;  // are computed while they are in the first-level caches
  int64_t units() const { return cut.groups * cut.chunks; }
  int64_t tasks() const { return bundles * units(); }
};
// direct: the kernels work on the tensors in place. least_rows: of a task, if there are as many.
Plan plan_of(const Tensor4& h, DwConv conv, bool direct, int64_t element, int64_t least_rows) {
  const int64_t batch = h.size[0], channels = h.size[1], height = h.size[2], width = h.size[3];
  const int64_t blocks = ceil_div(channels, kLanes), together = min64(blocks, direct ? kDirectBlocks : kPackedBlocks);
  const int64_t bundles = ceil_div(blocks, together);
  const int64_t row_bytes = direct ? 1 : together * kLanes * width * element;
  const Cut cut = cut_work(batch, bundles, height, width, row_bytes, least_rows, kFixedTasks);
  return {blocks, together, bundles, conv.kernel * conv.kernel, cut, clamp64(64 / width * 2, 2, cut.rows)};
}

// Pixels of tensors are too far apart for the processor to foresee them: a pixel's blocks, two pixels ahead.
template <class T>
VOPS_INLINE void prefetch_blocks(const Panel<T>& panel, T* pixel, int64_t blocks) {
  const int64_t per_line = max64(64 / (kLanes * sizeof(T)), 1);
  pixel += 2 * panel.column_step;
  for (int64_t b = 0; b < blocks; b += per_line) __builtin_prefetch(pixel + b * panel.block_step, 1);
}

// Of a row of pixels: h from u, and the sums over the channels of v * h.
template <class A, class T>
VOPS_INLINE void finish_forward(const Panel<T>& u, const Panel<T>& h, int64_t row, int64_t blocks, const A* v,
                                A* scores) {
  for (int64_t j = 0; j < u.width; j++) {
    const T* u_at = u.at(row, j);
    T* h_at = h.at(row, j);
    prefetch_blocks(h, h_at, blocks);
    Vec<A> sum = {};
    for_each_jam<4>(blocks, [&](int64_t b, auto count) {
      constexpr int N = decltype(count)::value;
      Vec<A> value[N];
#pragma GCC unroll 4
      for (int k = 0; k < N; k++) value[k] = load(u_at + (b + k) * u.block_step);
      gelu_of(value);
#pragma GCC unroll 4
      for (int k = 0; k < N; k++) {
        store(h_at + (b + k) * h.block_step, value[k]);
        sum += value[k] * load(v + (b + k) * kLanes);
      }
    });
    scores[j] = sum_of_lanes<A>(sum);
  }
}

// Of a row of pixels: h and du, from u and dh. Adds the sums over the pixels of dscores * h to dv, unless it is null.
template <class A, class T>
VOPS_INLINE void finish_backward(const Panel<T>& u, const Panel<const T>& dh, const Panel<T>& h, const Panel<T>& du,
                                 int64_t row, int64_t blocks, const A* v, const A* dscores, A* dv, int64_t dv_step) {
  for (int64_t j = 0; j < u.width; j++) {
    const Vec<A> dscore = Vec<A>{} + dscores[j];
    const T *u_at = u.at(row, j), *dh_at = dh.at(row, j);
    T *h_at = h.at(row, j), *du_at = du.at(row, j);
    prefetch_blocks(dh, dh_at, blocks);
    prefetch_blocks(h, h_at, blocks);
    for_each_jam<2>(blocks, [&](int64_t b, auto count) {
      constexpr int N = decltype(count)::value;
      Vec<A> value[N], slope[N];
#pragma GCC unroll 4
      for (int k = 0; k < N; k++) value[k] = load(u_at + (b + k) * u.block_step);
      gelu_and_slope(value, slope);
#pragma GCC unroll 4
      for (int k = 0; k < N; k++) {
        const int64_t block = b + k;
        store(h_at + block * h.block_step, value[k]);
        const Vec<A> grad = load(dh_at + block * dh.block_step) + dscore * load(v + block * kLanes);
        store(du_at + block * du.block_step, grad * slope[k]);
        if (dv) store(dv + block * dv_step, load(dv + block * dv_step) + dscore * value[k]);
      }
    });
  }
}

// d = gelu(score) behind the channels of a row of h, and what its type rounds off behind that.
template <class A>
void write_d(const Tensor4& d, int64_t n, int64_t row, const A* values) {
  with_types<A>(d.dtype, false, [&](auto type, auto) {
    auto* to = (decltype(type)*)d.data + n * d.stride[0] + row * d.stride[2];
    for (int64_t j = 0; j < d.size[3]; j++, to += d.stride[3]) {
      Vec<A> value = {};
      value[0] = values[j];
      store_n(to, value, 1);
      if (d.size[1] == 1) continue;
      value[0] -= load_n(to, 1)[0];
      store_n(to + d.stride[1], value, 1);
    }
  });
}

// The rows of all images as tasks. body(n, row, the index of its first pixel, memory for a row).
template <class A, class Body>
Error for_each_row(const Tensor4& scores, int64_t work, const Body& body) {
  const int64_t batch = scores.size[0], height = scores.size[2], width = scores.size[3];
  return for_each_task<A>(batch * height, batch * height * width * work, width + kLanes,
                          [&](int64_t task, A* memory) { body(task / height, task % height, task * width, memory); });
}

template <bool direct, class T, class A>
VOPS_INLINE void convolve(const Panel<const T>& x, int64_t height, const Weights<A>& w, int64_t blocks, DwConv conv,
                          RowRange out, const Panel<T>& y) {
  if (direct) return conv_rows(x, height, w, blocks, conv, out, y);
  for (int64_t b = 0; b < blocks; b++) conv_rows(x.block(b), height, w.block(b), 1, conv, out, y.block(b));
}

// T is the storage type where the kernels work on the tensors in place, else A.
template <bool direct, class T, class A>
Error run_forward(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& c,
                  const Tensor4& h, const Tensor4& d, const Tensor4& scores, DwConv conv) {
  const Plan plan = plan_of(h, conv, direct, sizeof(A), conv.kernel - 1);
  const int64_t batch = h.size[0], channels = h.size[1], height = h.size[2], width = h.size[3], f_height = f.size[2];
  const int64_t pixels = batch * height * width, together = plan.together;
  A* parts = (A*)thread_scratch(kSums, plan.bundles * pixels * sizeof(A));  // of the scores
  if (!parts) return kOutOfMemory;
  const int64_t weight_step = (plan.taps + 1) * kLanes;
  const int64_t source_step = direct ? 0 : min64(f_height, plan.cut.rows + conv.kernel - 1) * width * kLanes;
  const int64_t u_step = plan.group_rows * width * kLanes;
  const int64_t elements = together * (weight_step + kLanes + source_step + u_step);
  Error error = for_each_task<A>(plan.tasks(), pixels * channels * (plan.taps + 32), elements, [&](int64_t task, A* s) {
    const int64_t unit = task / plan.bundles, bundle = task % plan.bundles;
    const Channels all = channels_of_blocks(channels, bundle * together, together);
    A *weight_data = s, *v_data = s + together * weight_step, *source = v_data + together * kLanes;
    T* u_data = (T*)(source + together * source_step);
    pack_weight(w, all, weight_data, weight_step);
    pack_bias(b, all, weight_data + plan.taps * kLanes, weight_step);
    pack_bias(v, all, v_data, kLanes);
    const Weights<A> weights = {weight_data, weight_data + plan.taps * kLanes, weight_step};
    const RowRange rows = plan.cut.rows_of(unit % plan.cut.chunks, height);
    const RowRange images = plan.cut.images_of(unit / plan.cut.chunks, batch);
    const int64_t first_row = input_rows(rows, f_height, conv).begin;
    for (int64_t n = images.begin; n < images.end; n++) {
      int64_t packed = first_row;
      for (int64_t i = rows.begin; i < rows.end; i += plan.group_rows) {
        const RowRange now = {i, min64(i + plan.group_rows, rows.end)};
        const int64_t needed = input_rows(now, f_height, conv).end;
        const Panel<T> u = packed_panel(u_data, i, width, u_step);
        Panel<const T> in = tensor_panel<const T>(f, n, all.begin);
        Panel<T> to = tensor_panel<T>(h, n, all.begin);
        if constexpr (!direct) {
          if (needed > packed)
            pack_rows(f, n, all, packed, needed, source + (packed - first_row) * width * kLanes, source_step);
          packed = max64(packed, needed);
          in = packed_panel<const A>(source, first_row, width, source_step);
          to = u;
        }
        convolve<direct>(in, f_height, weights, all.blocks(), conv, now, u);
        for (int64_t row = now.begin; row < now.end; row++) {
          finish_forward<A>(u, to, row, all.blocks(), v_data, parts + ((bundle * batch + n) * height + row) * width);
        }
        if constexpr (!direct) unpack_rows<A>(u_data, u_step, h, n, all, now.begin, now.end);
      }
    }
  });
  if (error) return error;
  A bias[kLanes];
  pack_bias(c, {0, 1}, bias, kLanes);
  return for_each_row<A>(scores, 32, [&](int64_t n, int64_t row, int64_t pixel, A* values) {
    for_each_vector(width, [&](int64_t k, const auto& get, const auto& put) {
      Vec<A> score = Vec<A>{} + bias[0];
      for (int64_t bundle = 0; bundle < plan.bundles; bundle++) score += get(parts + bundle * pixels + pixel + k);
      put((A*)scores.data + pixel + k, score);
      store(values + k, gelu(score));
    });
    write_d(d, n, row, values);
  });
}

// What a pass adds up over the pixels, of a block: the gradients of the taps, of the convolution's bias and of v, and
// the sum of df.
struct SumLayout {
  int64_t taps;
  int64_t bias() const { return taps * kLanes; }
  int64_t v() const { return bias() + kLanes; }
  int64_t df() const { return v() + kLanes; }
  int64_t step() const { return df() + kLanes; }
};

// Rows overlap by the reach of the convolution, whose gradients read du from the cache: it is never written to memory.
template <bool direct, class T, class A>
Error run_backward(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& scores,
                   const Tensor4& dd, const Tensor4& dh, const Tensor4& h, const Tensor4& d,
                   const ChannelAggregationFfnGrads& grads, int64_t first, DwConv conv) {
  const Plan plan = plan_of(h, conv, direct, 3 * sizeof(A), 6 * (conv.kernel - 1));
  const int64_t batch = h.size[0], channels = h.size[1], height = h.size[2], width = h.size[3];
  const int64_t f_height = f.size[2], du_height = dh.size[2], reach = conv.kernel / 2, together = plan.together;
  const int64_t pixels = batch * du_height * width;
  const DwConv transposed = {conv.kernel, 1, 1, reach - first, reach};  // from du to df
  const SumLayout layout = {plan.taps};
  const int64_t task_sums = together * layout.step();
  A* parts = (A*)thread_scratch(kSums, (plan.tasks() * task_sums + pixels + batch * du_height) * sizeof(A));
  if (!parts) return kOutOfMemory;
  A *dscores = parts + plan.tasks() * task_sums, *row_sums = dscores + pixels;
  Error error = for_each_row<A>(scores, 64, [&](int64_t n, int64_t row, int64_t pixel, A* values) {
    A sum = 0;
    for_each_vector(width, [&](int64_t k, const auto& get, const auto& put) {
      const Vec<A> score = get((const A*)scores.data + pixel + k);
      const Vec<A> dscore = get((const A*)dd.data + pixel + k) * gelu_grad(score);
      put(dscores + pixel + k, dscore);
      store(values + k, gelu(score));
      sum += sum_of_lanes<A>(dscore);
    });
    const bool own = first <= row && row < first + height;
    if (own) write_d(d, n, row - first, values);
    row_sums[n * du_height + row] = own ? sum : 0;
  });
  if (error) return error;

  const int64_t weight_step = (plan.taps + 1) * kLanes, row_elements = width * kLanes;
  const int64_t du_rows = min64(du_height, min64(plan.cut.rows + 2 * reach, 2 * reach + 4 * plan.group_rows));
  const int64_t du_step = du_rows * row_elements, u_step = plan.group_rows * row_elements;
  const int64_t source_step = direct ? 0 : min64(f_height, plan.cut.rows + 4 * reach) * row_elements;
  const int64_t dh_step = direct ? 0 : u_step, df_step = direct ? 0 : (plan.group_rows + reach) * row_elements;
  const int64_t elements = together * (2 * weight_step + kLanes + source_step + du_step + u_step + dh_step + df_step);
  error = for_each_task<A>(plan.tasks(), pixels * channels * (3 * plan.taps + 48), elements, [&](int64_t task, A* s) {
    const int64_t unit = task / plan.bundles, bundle = task % plan.bundles;
    const Channels all = channels_of_blocks(channels, bundle * together, together);
    const int64_t blocks = all.blocks();
    A *weight_data = s, *reversed_data = s + together * weight_step, *v_data = reversed_data + together * weight_step;
    A *source = v_data + together * kLanes, *dh_data = source + together * source_step;
    A* df_data = dh_data + together * dh_step;
    T *du_data = (T*)(df_data + together * df_step), *u_data = du_data + together * du_step;
    pack_weight(w, all, weight_data, weight_step);
    pack_bias(b, all, weight_data + plan.taps * kLanes, weight_step);
    pack_bias(v, all, v_data, kLanes);
    memcpy(reversed_data, weight_data, blocks * weight_step * sizeof(A));
    for (int64_t i = 0; i < blocks; i++) {
      reverse_taps(reversed_data + i * weight_step, plan.taps);
      memset(reversed_data + i * weight_step + plan.taps * kLanes, 0, kLanes * sizeof(A));
    }
    const Weights<A> weights = {weight_data, weight_data + plan.taps * kLanes, weight_step};
    const Weights<A> reversed = {reversed_data, reversed_data + plan.taps * kLanes, weight_step};
    A* sums = parts + task * task_sums;
    memset(sums, 0, task_sums * sizeof(A));
    const RowRange rows = plan.cut.rows_of(unit % plan.cut.chunks, height);
    const RowRange images = plan.cut.images_of(unit / plan.cut.chunks, batch);
    const RowRange in_du = {rows.begin + first, rows.end + first};
    const RowRange needed = {max64(in_du.begin - reach, 0), min64(in_du.end + reach, du_height)};
    const int64_t first_row = input_rows(needed, f_height, conv).begin;
    for (int64_t n = images.begin; n < images.end; n++) {
      int64_t packed = first_row, du_first = needed.begin, done = rows.begin;  // rows of f, of du, of df
      for (int64_t i = needed.begin; i < needed.end; i += plan.group_rows) {
        const RowRange now = {i, min64(i + plan.group_rows, needed.end)};
        if (now.end - du_first > du_rows) {
          const int64_t kept = done + first - reach;
          for (int64_t k = 0; k < blocks; k++) {
            T* block = du_data + k * du_step;
            memmove(block, block + (kept - du_first) * row_elements, (i - kept) * row_elements * sizeof(T));
          }
          du_first = kept;
        }
        const Panel<T> u = packed_panel(u_data, i, width, u_step), du = packed_panel(du_data, du_first, width, du_step);
        const Panel<const T> du_in = packed_panel<const T>(du_data, du_first, width, du_step);
        Panel<const T> in = tensor_panel<const T>(f, n, all.begin), dh_in = tensor_panel<const T>(dh, n, all.begin);
        Panel<T> to = tensor_panel<T>(h, n, all.begin);
        to.first_row = first;
        if constexpr (!direct) {
          const int64_t end = input_rows(now, f_height, conv).end;
          if (end > packed)
            pack_rows(f, n, all, packed, end, source + (packed - first_row) * row_elements, source_step);
          packed = max64(packed, end);
          pack_rows(dh, n, all, now.begin, now.end, dh_data, dh_step);
          in = packed_panel<const A>(source, first_row, width, source_step);
          dh_in = packed_panel<const A>(dh_data, i, width, dh_step);
          to = u;
        }
        convolve<direct>(in, f_height, weights, blocks, conv, now, u);
        const RowRange own = {max64(now.begin, in_du.begin), min64(now.end, in_du.end)};
        for (int64_t row = now.begin; row < now.end; row++) {
          const bool owned = own.begin <= row && row < own.end;
          finish_backward<A>(u, dh_in, owned ? to : u, du, row, blocks, v_data, dscores + (n * du_height + row) * width,
                             owned ? sums + layout.v() : nullptr, layout.step());
        }
        if constexpr (!direct) {
          const A* rows_of_h = u_data + (own.begin - i) * row_elements;
          if (own.size()) unpack_rows<A>(rows_of_h, u_step, h, n, all, own.begin - first, own.end - first);
        }
        if (own.size() && (grads.dw.data || grads.db.data)) {
          conv_weight_rows(du_in, in, f_height, blocks, conv, own, sums, layout.step());
        }
        const int64_t reached = now.end - first - reach;
        const RowRange ready = {done, now.end == needed.end ? rows.end : min64(reached, rows.end)};
        if (ready.size() == 0) continue;
        Panel<T> out = tensor_panel<T>(grads.df, n, all.begin);
        if constexpr (!direct) out = packed_panel(df_data, ready.begin, width, df_step);
        convolve<direct>(du_in, du_height, reversed, blocks, transposed, ready, out);
        if (grads.df_sums.data) sum_rows(as_const(out), blocks, ready, sums + layout.df(), layout.step());
        if constexpr (!direct) unpack_rows<A>(df_data, df_step, grads.df, n, all, ready.begin, ready.end);
        done = ready.end;
      }
    }
  });
  if (error) return error;
  for (int64_t bundle = 0; bundle < plan.bundles; bundle++) {
    A* total = parts + bundle * task_sums;
    for (int64_t unit = 1; unit < plan.units(); unit++) {
      add_panel(total, total + unit * plan.bundles * task_sums, task_sums / kLanes);
    }
    const Channels all = channels_of_blocks(channels, bundle * together, together);
    const auto write = [&](const Tensor4& to, int64_t from) {
      if (to.data) unpack_rows<A>(total + from, layout.step(), to, 0, all, 0, 1);
    };
    write(grads.dw, 0);
    write(grads.db, layout.bias());
    write(grads.dv, layout.v());
    write(grads.df_sums, layout.df());
  }
  A dc[kLanes] = {};
  for (int64_t i = 0; i < batch * du_height; i++) dc[0] += row_sums[i];
  if (grads.dc.data) unpack_rows<A>(dc, kLanes, grads.dc, 0, {0, 1}, 0, 1);
  return nullptr;
}

// Calls run(whether the kernels work on the tensors in place, storage type, type of the sums).
template <class F>
Error with_form(const Tensor4& f, DwConv conv, const F& run) {
  if (f.dtype == kFloat64) return run(Flag<false>(), double(), double());
  if (conv.kernel != 3 || f.size[1] % kLanes != 0) return run(Flag<false>(), float(), float());
  if (f.dtype == kBFloat16) return run(Flag<true>(), bf16(), float());
  if (f.dtype == kFloat16) return run(Flag<true>(), f16(), float());
  return run(Flag<true>(), float(), float());
}

Error forward(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& c,
              const Tensor4& h, const Tensor4& d, const Tensor4& scores, DwConv conv) {
  return with_form(f, conv, [&](auto direct, auto storage, auto sum) {
    return run_forward<decltype(direct)::value, decltype(storage), decltype(sum)>(f, w, b, v, c, h, d, scores, conv);
  });
}
Error backward(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& scores,
               const Tensor4& dd, const Tensor4& dh, const Tensor4& h, const Tensor4& d,
               const ChannelAggregationFfnGrads& grads, int64_t first, DwConv conv) {
  return with_form(f, conv, [&](auto direct, auto storage, auto sum) {
    return run_backward<decltype(direct)::value, decltype(storage), decltype(sum)>(f, w, b, v, scores, dd, dh, h, d,
                                                                                   grads, first, conv);
  });
}

}  // namespace

extern const ChannelAggregationFfnOps channel_aggregation_ffn_ops;
const ChannelAggregationFfnOps channel_aggregation_ffn_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
