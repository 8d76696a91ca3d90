#include "gated_recursion.h"
#include "lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

template <class A>
Error run_gate(const Lines& lines, const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& p) {
  const int64_t channels = u.size[1], count = lines.count(), tasks = min64(count, tasks_for_threads());
  return for_each_task<A>(tasks, count * lines.length * kElementWork, padded(channels), [&](int64_t task, A* bias) {
    pack_bias(b, {0, channels}, bias, kLanes);
    with_types<A>(u.dtype, lines.planes, [&](auto type, auto planes) {
      typedef decltype(type) T;
      const Operand<const T> from(u, lines), by(q, lines);
      const Operand<T> to(p, lines);
      for_each_line(lines, task * count / tasks, (task + 1) * count / tasks, [&](int64_t n, int64_t i) {
        const T *pu = from.at(n, i), *pq = by.at(n, i);
        T* pp = to.at(n, i);
        for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
          put(pp + k, (get(pu + k) + of_channel<A, decltype(planes)::value>(bias, i, k)) * get(pq + k));
        });
      });
    });
  });
}

template <class A>
Error run_gate_backward(const Lines& lines, const Tensor4& dp, const Tensor4& u, const Tensor4& b, const Tensor4& q,
                        const Tensor4& du, const Tensor4& dq, const Tensor4& db) {
  const int64_t channels = u.size[1];
  const PartialSums<A> sums = make_sums<A>(lines, channels);
  if (!sums.data) return kOutOfMemory;
  const Error error = for_each_share(lines, sums, padded(channels), [&](A* part, int64_t begin, int64_t end, A* bias) {
    pack_bias(b, {0, channels}, bias, kLanes);
    with_types<A>(u.dtype, lines.planes, [&](auto type, auto planes) {
      typedef decltype(type) T;
      constexpr bool kPlanes = decltype(planes)::value;
      const Operand<const T> grads(dp, lines), from(u, lines), by(q, lines);
      const Operand<T> to_u(du, lines), to_q(dq, lines);
      for_each_line(lines, begin, end, [&](int64_t n, int64_t i) {
        const T *pg = grads.at(n, i), *pu = from.at(n, i), *pq = by.at(n, i);
        T *pdu = to_u.at(n, i), *pdq = to_q.at(n, i);
        A* own = kPlanes ? part + n * sums.step + i : part;
        sum_line<A, kPlanes>(lines.length, own, [&](int64_t k, const auto& get, const auto& put) {
          const Vec<A> g = get(pg + k), biased = get(pu + k) + of_channel<A, kPlanes>(bias, i, k);
          const Vec<A> v = g * get(pq + k);
          put(pdu + k, v);
          put(pdq + k, g * biased);
          return v;
        });
      });
    });
  });
  if (!error && db.data) sums.total(db);
  return error;
}

template <class A>
Error run_channel_sums(const Lines& lines, const Tensor4& t, const Tensor4& out) {
  const PartialSums<A> sums = make_sums<A>(lines, t.size[1]);
  if (!sums.data) return kOutOfMemory;
  const Error error = for_each_share(lines, sums, 0, [&](A* part, int64_t begin, int64_t end, A*) {
    with_types<A>(t.dtype, lines.planes, [&](auto type, auto planes) {
      typedef decltype(type) T;
      constexpr bool kPlanes = decltype(planes)::value;
      const Operand<const T> from(t, lines);
      for_each_line(lines, begin, end, [&](int64_t n, int64_t i) {
        const T* p = from.at(n, i);
        A* own = kPlanes ? part + n * sums.step + i : part;
        sum_line<A, kPlanes>(lines.length, own, [&](int64_t k, const auto& get, const auto&) { return get(p + k); });
      });
    });
  });
  if (!error) sums.total(out);
  return error;
}

Error gate(const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& p) {
  Lines lines;
  if (Error error = find_lines(&lines, u, q, p)) return error;
  return (u.dtype == kFloat64 ? run_gate<double> : run_gate<float>)(lines, u, b, q, p);
}
Error gate_backward(const Tensor4& dp, const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& du,
                    const Tensor4& dq, const Tensor4& db) {
  Lines lines;
  if (Error error = find_lines(&lines, dp, u, q, du, dq)) return error;
  return (u.dtype == kFloat64 ? run_gate_backward<double> : run_gate_backward<float>)(lines, dp, u, b, q, du, dq, db);
}
Error channel_sums(const Tensor4& t, const Tensor4& sums) {
  Lines lines;
  if (Error error = find_lines(&lines, t)) return error;
  return (t.dtype == kFloat64 ? run_channel_sums<double> : run_channel_sums<float>)(lines, t, sums);
}

}  // namespace

extern const GatedRecursionOps gated_recursion_ops;
const GatedRecursionOps gated_recursion_ops = {gate, gate_backward, channel_sums};

}  // namespace VOPS_ISA
}  // namespace vops
