// A task is a head of one window, or some image rows of its queries. Logits exist for a few queries at a time; keys are
// packed twice, with channels and with keys in the lanes, so that every product runs along vectors.
#include "attention_windows.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int64_t kForwardRows = 8, kBackwardRows = 32;  // queries whose logits exist at a time
constexpr int64_t kTermsAtOnce = 64;
constexpr int64_t kTasksOfOneHead = 16;  // tasks so many or more: backward does not cut heads

template <class A>
const A* at(const A* panel, int64_t width, int64_t token, int64_t channel) {
  return panel + (channel / kLanes * width + token) * kLanes + channel % kLanes;
}

template <class A>
void scale_panel(A* panel, int64_t vectors, A factor) {
  for (int64_t i = 0; i < vectors * kLanes; i += kLanes) store(panel + i, load(panel + i) * factor);
}

// What a table is copied to: rows are loaded in whole vectors.
template <class A>
void copy_table(const Tensor4& table, const Plan& p, int64_t head, A* to) {
  memcpy(to, (const A*)table.data + head * p.table_size(), p.table_size() * sizeof(A));
  memset(to + p.table_size(), 0, kLanes * sizeof(A));
}

// The bias of some queries, from token `first` on, to every key; what lies behind the last key never is the largest.
// Segments of one row of the table follow each other, and each overwrites what the one before wrote past its end. Rows
// that complete a product have no bias.
template <class A>
void fill_bias(const A* table, const Plan& p, const Task& t, int64_t first, int64_t count, A* logits) {
  const int64_t keys = t.keys();
  for (int64_t i = 0; i < whole_rows(count); i++, logits += p.width) {
    if (table && i < count) {
      const int64_t y = (first + i) / t.columns, x = (first + i) % t.columns;
      const A* row = table + (p.a.window_height - 1 - y) * p.table_width() + p.a.window_width - 1 - x;
      for (int64_t k = 0; k < keys; k += t.columns, row += p.table_width()) {
        for (int64_t c = 0; c < t.columns; c += kLanes) store(logits + k + c, load(row + c));
      }
    } else {
      memset(logits, 0, keys * sizeof(A));
    }
    for (int64_t k = keys; k < p.width; k++) logits[k] = -INFINITY;
  }
}

// out[i][j] += a_i b_j for rows of channels: a panel, from a token on, and a turned one.
template <class A>
void add_products(const A* a, const A* turned, const Plan& p, int64_t count, int64_t keys, A* out) {
  for_each_product<A>(whole_rows(count), blocks_of(keys), [&](auto rows, auto columns, int64_t i, int64_t j) {
    constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
    A* to = out + i * p.width + j * kLanes;
    Vec<A> sum[kRows][kColumns] = {};
    for (int64_t k = 0; k < p.d; k += kLanes) {
      const A* with = turned + (j * padded(p.d) + k) * kLanes;
      multiply_add<A>(sum, at(a, p.width, i, k), kLanes, 1, with, kLanes, padded(p.d) * kLanes, min64(kLanes, p.d - k));
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; c++) {
        A* one = to + r * p.width + c * kLanes;
        store(one, load(one) + sum[r][c]);
      }
    }
  });
}

// Tokens i of a panel: the sum over k of weights[i * row + k * step] times token k of another, scaled by the factor of
// the row, or added to what is there. Sums of kTermsAtOnce are added as a whole: equal terms, one by one, would round
// all the same way.
template <class A>
void weigh(const A* weights, int64_t row, int64_t step, const A* panel, int64_t count, const Plan& p, int64_t tokens,
           const A* factors, A* out) {
  for_each_product<A>(whole_rows(tokens), blocks_of(p.d), [&](auto rows, auto columns, int64_t i, int64_t j) {
    constexpr int kRows = decltype(rows)::value, kColumns = decltype(columns)::value;
    A* to = out + (j * p.width + i) * kLanes;
    for (int64_t k = 0; k < count; k += kTermsAtOnce) {
      const int64_t terms = min64(kTermsAtOnce, count - k);
      const A *a = weights + i * row + k * step, *b = panel + (j * p.width + k) * kLanes;
      Vec<A> sum[kRows][kColumns] = {};
      multiply_add<A>(sum, a, row, step, b, kLanes, p.width * kLanes, terms);
      const bool adds = !factors || k > 0, scales = factors && k + terms == count;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; c++) {
          A* one = to + (c * p.width + r) * kLanes;
          if (adds) sum[r][c] += load(one);
          store(one, scales ? sum[r][c] * factors[i + r] : sum[r][c]);
        }
      }
    }
  });
}

VOPS_INLINE float log_of(float v) { return ::logf(v); }
VOPS_INLINE double log_of(double v) { return ::log(v); }

// Logits become exponentials; returns their sum.
template <class A>
A exponentiate(A* row, int64_t width, A largest) {
  Vec<A> sums = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec<A> e = exp_of_negative(load(row + j) - largest);
    store(row + j, e);
    sums += e;
  }
  return sum_of_lanes<A>(sums);
}
template <class A>
A largest_of(const A* row, int64_t width) {
  Vec<A> most = load(row);
  for (int64_t j = kLanes; j < width; j += kLanes) most = load(row + j) > most ? load(row + j) : most;
  return largest_lane<A>(most);
}

template <class A>
A* of_tokens(const Tensor4& lse, const Plan& p, const Task& t) {
  return (A*)lse.data + (t.sample * p.heads + t.head) * p.a.height * p.a.width;
}
// Where a token of a window is in the map.
int64_t in_map(const Plan& p, const Task& t, int64_t token) {
  return (t.top + token / t.columns) * p.a.width + t.left + token % t.columns;
}

template <class A>
Error run_forward(const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& table,
                  const RelativeAttention& attention, const Tensor4& y, const Tensor4& lse) {
  const Plan p(q, attention, tasks_for_threads());
  const int64_t size = p.panel(), table_size = p.table_size() + kLanes;
  const int64_t scratch_size = 5 * size + kForwardRows * p.width + kLanes + table_size;
  return for_each_task<A>(p.tasks(), p.work(2), scratch_size, [&](int64_t i, A* scratch) {
    const Task t = p.task(i);
    A *pq = scratch, *pk = pq + size, *pv = pk + size, *turned = pv + size, *py = turned + size;
    A *logits = py + size, *bias = logits + kForwardRows * p.width + kLanes, factors[kForwardRows];
    if (table.data) copy_table(table, p, t.head, bias);
    p.pack(k, t, 0, t.rows, pk);
    p.pack(v, t, 0, t.rows, pv);
    p.pack(q, t, t.first, t.last, pq);
    p.turn(pk, turned);
    scale_panel(pq, size / kLanes, (A)attention.scale);
    A* sums = of_tokens<A>(lse, p, t);
    const int64_t before = t.first * t.columns;
    for (int64_t n = 0; n < t.queries(); n += kForwardRows) {
      const int64_t count = min64(kForwardRows, t.queries() - n);
      fill_bias(table.data ? bias : nullptr, p, t, before + n, count, logits);
      add_products(pq + n * kLanes, turned, p, count, t.keys(), logits);
      for (int64_t r = 0; r < whole_rows(count); r++) {
        const int64_t width = padded(t.keys());
        const A largest = largest_of(logits + r * p.width, width);
        const A sum = exponentiate(logits + r * p.width, width, largest);
        factors[r] = 1 / sum;
        if (r < count) sums[in_map(p, t, before + n + r)] = largest + log_of(sum);
      }
      weigh(logits, p.width, 1, pv, t.keys(), p, count, factors, py + n * kLanes);
    }
    p.unpack(py, y, t, t.first, t.last);
  });
}

// logits become what the softmax gives, and grads, those of the softmax, become those of the logits. Weights are
// divided by their sum once more: lse is rounded, which shows where logits are large and one weight is almost all.
template <class A>
void softmax_backward(A* logits, A* grads, int64_t width, A lse) {
  Vec<A> products = {}, sums = {};
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec<A> weight = exp_of_negative(load(logits + j) - lse);
    store(logits + j, weight);
    sums += weight;
    products += weight * load(grads + j);
  }
  const A inverse = 1 / sum_of_lanes<A>(sums), mean = sum_of_lanes<A>(products) * inverse;
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec<A> weight = load(logits + j) * inverse;
    store(logits + j, weight);
    store(grads + j, weight * (load(grads + j) - mean));
  }
}

// The transpose of fill_bias: gradients of logits are added to those of the table. Queries take turns with two tables,
// as what one has just written the next one would read at an offset, which has to wait.
template <class A>
void add_to_table(const A* grads, const Plan& p, const Task& t, int64_t first, int64_t count, A* table, A* other) {
  for (int64_t i = 0; i < count; i++, grads += p.width) {
    const int64_t y = (first + i) / t.columns, x = (first + i) % t.columns;
    A* row = (i % 2 ? other : table) + (p.a.window_height - 1 - y) * p.table_width() + p.a.window_width - 1 - x;
    for (int64_t k = 0; k < t.keys(); k += t.columns, row += p.table_width()) {
      for_each_vector(t.columns, [&](int64_t c, const auto& get, const auto&) {
        store(row + c, load(row + c) + get(grads + k + c));
      });
    }
  }
}

template <class A>
Error run_backward(const Tensor4& dy, const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& table,
                   const RelativeAttention& attention, const Tensor4& lse, const Tensor4& dq, const Tensor4& dk,
                   const Tensor4& dv, const Tensor4& dtable) {
  const Plan p(q, attention, kTasksOfOneHead);
  const int64_t size = p.panel(), table_size = padded(p.table_size()) + kLanes, logits_size = kBackwardRows * p.width;
  // What tasks add to together: the gradients of the keys and values where heads are cut, and those of the table.
  const int64_t tokens_size = p.parts > 1 ? 2 * size : 0, summed_size = dtable.data ? table_size : 0;
  A* shared = (A*)thread_scratch(kSums, max64(p.tasks() * (tokens_size + summed_size), 1) * sizeof(A));
  if (!shared) return kOutOfMemory;
  const PartialSums<A> tokens = {shared, p.parts, tokens_size / kLanes};
  const PartialSums<A> tables = {shared + p.tasks() * tokens_size, p.tasks() / max64(p.heads, 1), table_size / kLanes};
  const int64_t scratch_size = 8 * size + 2 * (logits_size + kLanes + table_size);
  Error error = for_each_task<A>(p.tasks(), p.work(5), scratch_size, [&](int64_t i, A* scratch) {
    const Task t = p.task(i);
    A *pq = scratch, *pk = pq + size, *pdy = pk + size, *keys = pdy + size, *values = keys + size;
    A *pdq = values + size, *pv = pdq, *pdk = pdq + size, *pdv = pdk + size;
    A *logits = pdv + size, *grads = logits + logits_size + kLanes, *bias = grads + logits_size + kLanes,
      *other = bias + table_size;
    A *of_table = dtable.data ? tables.panel(0, i) : nullptr, scales[kBackwardRows];
    if (p.parts > 1) pdk = tokens.panel(0, i), pdv = pdk + size;
    if (table.data) copy_table(table, p, t.head, bias);
    if (dtable.data) memset(of_table, 0, table_size * sizeof(A)), memset(other, 0, table_size * sizeof(A));
    memset(pdk, 0, size * sizeof(A));
    memset(pdv, 0, size * sizeof(A));
    p.pack(v, t, 0, t.rows, pv);
    p.turn(pv, values);
    p.pack(k, t, 0, t.rows, pk);
    p.turn(pk, keys);
    p.pack(q, t, t.first, t.last, pq);
    p.pack(dy, t, t.first, t.last, pdy);
    scale_panel(pq, size / kLanes, (A)attention.scale);
    for (A& scale : scales) scale = (A)attention.scale;
    const A* sums = of_tokens<A>(lse, p, t);
    const int64_t before = t.first * t.columns, width = padded(t.keys());
    for (int64_t n = 0; n < t.queries(); n += kBackwardRows) {
      const int64_t count = min64(kBackwardRows, t.queries() - n), whole = whole_rows(count);
      fill_bias(table.data ? bias : nullptr, p, t, before + n, count, logits);
      add_products(pq + n * kLanes, keys, p, count, t.keys(), logits);
      memset(grads, 0, whole * p.width * sizeof(A));
      add_products(pdy + n * kLanes, values, p, count, t.keys(), grads);
      for (int64_t r = 0; r < whole; r++) {
        const A of_row = r < count ? sums[in_map(p, t, before + n + r)] : 0;
        softmax_backward(logits + r * p.width, grads + r * p.width, width, of_row);
      }
      if (dv.data) weigh<A>(logits, 1, p.width, pdy + n * kLanes, count, p, t.keys(), nullptr, pdv);
      if (dk.data) weigh<A>(grads, 1, p.width, pq + n * kLanes, count, p, t.keys(), nullptr, pdk);
      if (dq.data) weigh<A>(grads, p.width, 1, pk, t.keys(), p, count, scales, pdq + n * kLanes);
      if (dtable.data) add_to_table(grads, p, t, before + n, count, of_table, other);
    }
    if (dtable.data) add_panel(of_table, other, padded(p.table_size()) / kLanes);
    if (dq.data) p.unpack(pdq, dq, t, t.first, t.last);
    if (p.parts > 1) return;
    if (dk.data) p.unpack(pdk, dk, t, 0, t.rows);
    if (dv.data) p.unpack(pdv, dv, t, 0, t.rows);
  });
  if (error) return error;

  if (p.parts > 1) {
    error = for_each_task<A>(p.tasks() / p.parts, p.tasks() * size, 0, [&](int64_t i, A*) {
      const A* total = tokens.total(i);
      const Task t = p.task(i * p.parts);
      if (dk.data) p.unpack(total, dk, t, 0, t.rows);
      if (dv.data) p.unpack(total + size, dv, t, 0, t.rows);
    });
  }
  if (error || !dtable.data) return error;
  return for_each_task<A>(p.heads, p.tasks() * table_size, 0, [&](int64_t head, A*) {
    const A* total = tables.total(head);
    memcpy((A*)dtable.data + head * p.table_size(), total, p.table_size() * sizeof(A));
  });
}

Error forward(const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& table,
              const RelativeAttention& attention, const Tensor4& y, const Tensor4& lse) {
  return (lse.dtype == kFloat64 ? run_forward<double> : run_forward<float>)(q, k, v, table, attention, y, lse);
}
Error backward(const Tensor4& dy, const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& table,
               const RelativeAttention& attention, const Tensor4& lse, const Tensor4& dq, const Tensor4& dk,
               const Tensor4& dv, const Tensor4& dtable) {
  return (lse.dtype == kFloat64 ? run_backward<double> : run_backward<float>)(dy, q, k, v, table, attention, lse, dq,
                                                                              dk, dv, dtable);
}

}  // namespace

extern const RelativeAttentionOps relative_attention_ops;
const RelativeAttentionOps relative_attention_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
