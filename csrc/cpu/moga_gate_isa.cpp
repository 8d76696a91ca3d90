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

constexpr int64_t kGateWork = 8 * kElementWork;

template <bool doubled>
Error run_forward(const Lines& lines, const Tensor4& g, const Tensor4& v, const Tensor4& y) {
  return with_sum_type(g.dtype, [&](auto zero) {
    return for_each_part_of_any<decltype(zero)>(lines, g.dtype, kGateWork, [&](auto part) {
      const auto gates = part.in(g), values = part.in(v);
      const auto to = part.out(y);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *pg = gates[i], *pv = values[i];
        auto* py = to[i];
        for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
          put(py + k, activated<doubled>(get(pg + k)) * activated<doubled>(get(pv + k)));
        });
      }
    });
  });
}

template <bool doubled>
Error run_backward(const Lines& lines, const Tensor4& dy, const Tensor4& g, const Tensor4& v, const Tensor4& dg,
                   const Tensor4& dv) {
  return with_sum_type(g.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    return for_each_part_of_any<A>(lines, g.dtype, kGateWork, [&](auto part) {
      const auto grads = part.in(dy), gates = part.in(g), values = part.in(v);
      const auto to_gates = part.out(dg), to_values = part.out(dv);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *pdy = grads[i], *pg = gates[i], *pv = values[i];
        auto *pdg = to_gates[i], *pdv = to_values[i];
        for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
          const Vec<A> grad = get(pdy + k);
          Vec<A> gate = get(pg + k), value = get(pv + k);
          const Vec<A> gate_slope = activate<doubled>(gate), value_slope = activate<doubled>(value);
          if (pdg) put(pdg + k, grad * value * gate_slope);
          if (pdv) put(pdv + k, grad * gate * value_slope);
        });
      }
    });
  });
}

Error forward(const Tensor4& g, const Tensor4& v, const Tensor4& y, bool doubled) {
  Lines lines;
  if (Error error = find_lines(&lines, g, v, y)) return error;
  return (doubled ? run_forward<true> : run_forward<false>)(lines, g, v, y);
}
Error backward(const Tensor4& dy, const Tensor4& g, const Tensor4& v, const Tensor4& dg, const Tensor4& dv,
               bool doubled) {
  Lines lines;
  if (Error error = find_lines(&lines, dy, g, v, dg.data ? dg : g, dv.data ? dv : v)) return error;
  return (doubled ? run_backward<true> : run_backward<false>)(lines, dy, g, v, dg, dv);
}

}  // namespace

extern const MogaGateOps moga_gate_ops;
const MogaGateOps moga_gate_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
