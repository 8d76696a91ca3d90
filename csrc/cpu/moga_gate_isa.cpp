#include "lines.h"
#include "moga_gate.h"

namespace vops {
namespace VOPS_ISA {
namespace {

template <bool doubled, class V>
VOPS_INLINE V activated(V x) {
  if constexpr (doubled) return silu(silu(x));
  return silu(x);
}
VOPS_INLINE Float sigmoid(Float x) { return 1.f / (1.f + exp(-x)); }
VOPS_INLINE Double sigmoid(Double x) {
  for (int k = 0; k < kLanes; k++) x[k] = 1. / (1. + ::exp(-x[k]));
  return x;
}
// x becomes its activation. Returns the slope: one exponential and one division serve both.
template <bool doubled, class V>
VOPS_INLINE V activate(V& x) {
  V s = sigmoid(x);
  x *= s;
  V slope = s + x * (1.f - s);
  if constexpr (doubled) {
    s = sigmoid(x);
    x *= s;
    slope *= s + x * (1.f - s);
  }
  return slope;
}

// Calls f(type, whether silu is doubled, image, line in it) for all lines.
template <class A, class F>
Error for_all_lines(const Lines& lines, int dtype, bool doubled, const F& f) {
  const int64_t count = lines.count(), tasks = min64(count, tasks_for_threads());
  return for_each_task<A>(tasks, count * lines.length * kElementWork * 8, 1, [&](int64_t task, A*) {
    with_types<A>(dtype, doubled, [&](auto type, auto twice) {
      for_each_line(lines, task * count / tasks, (task + 1) * count / tasks,
                    [&](int64_t n, int64_t i) { f(type, twice, n, i); });
    });
  });
}

template <class A>
Error run_gate(const Lines& lines, const Tensor4& g, const Tensor4& v, const Tensor4& y, bool doubled) {
  return for_all_lines<A>(lines, g.dtype, doubled, [&](auto type, auto twice, int64_t n, int64_t i) {
    typedef decltype(type) T;
    constexpr bool kTwice = decltype(twice)::value;
    const T *pg = Operand<const T>(g, lines).at(n, i), *pv = Operand<const T>(v, lines).at(n, i);
    T* py = Operand<T>(y, lines).at(n, i);
    for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
      put(py + k, activated<kTwice>(get(pg + k)) * activated<kTwice>(get(pv + k)));
    });
  });
}

template <class A>
Error run_gate_backward(const Lines& lines, const Tensor4& dy, const Tensor4& g, const Tensor4& v, const Tensor4& dg,
                        const Tensor4& dv, bool doubled) {
  return for_all_lines<A>(lines, g.dtype, doubled, [&](auto type, auto twice, int64_t n, int64_t i) {
    typedef decltype(type) T;
    constexpr bool kTwice = decltype(twice)::value;
    const T *pdy = Operand<const T>(dy, lines).at(n, i), *pg = Operand<const T>(g, lines).at(n, i),
            *pv = Operand<const T>(v, lines).at(n, i);
    T *pdg = Operand<T>(dg, lines).at(n, i), *pdv = Operand<T>(dv, lines).at(n, i);
    for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
      const Vec<A> grad = get(pdy + k);
      Vec<A> gate = get(pg + k), value = get(pv + k);
      const Vec<A> gate_slope = activate<kTwice>(gate), value_slope = activate<kTwice>(value);
      if (dg.data) put(pdg + k, grad * value * gate_slope);
      if (dv.data) put(pdv + k, grad * gate * value_slope);
    });
  });
}

Error forward(const Tensor4& g, const Tensor4& v, const Tensor4& y, bool doubled) {
  Lines lines;
  if (Error error = find_lines(&lines, g, v, y)) return error;
  return (g.dtype == kFloat64 ? run_gate<double> : run_gate<float>)(lines, g, v, y, doubled);
}
Error backward(const Tensor4& dy, const Tensor4& g, const Tensor4& v, const Tensor4& dg, const Tensor4& dv,
               bool doubled) {
  Lines lines;
  if (Error error = find_lines(&lines, dy, g, v, dg.data ? dg : g, dv.data ? dv : v)) return error;
  return (g.dtype == kFloat64 ? run_gate_backward<double> : run_gate_backward<float>)(lines, dy, g, v, dg, dv, doubled);
}

}  // namespace

extern const MogaGateOps moga_gate_ops;
const MogaGateOps moga_gate_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
