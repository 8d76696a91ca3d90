#include "activations.h"
#include "lines.h"
#include "mlp.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int64_t kActivationWork = 24;  // of an element, in multiply-adds

template <class A>
Error run_activate(const Lines& lines, const Tensor4& u, const Tensor4& a, Activation activation) {
  const int64_t count = lines.count(), tasks = min64(count, tasks_for_threads());
  return for_each_task<A>(tasks, count * lines.length * kActivationWork, 1, [&](int64_t task, A*) {
    with_types<A>(u.dtype, lines.planes, [&](auto type, auto) {
      typedef decltype(type) T;
      const Operand<const T> from(u, lines);
      const Operand<T> to(a, lines);
      with_activation(activation, [&](auto act) {
        for_each_line(lines, task * count / tasks, (task + 1) * count / tasks, [&](int64_t n, int64_t i) {
          const T* pu = from.at(n, i);
          T* pa = to.at(n, i);
          for_each_vector(lines.length, [&](int64_t k, const auto& get, const auto& put) {
            put(pa + k, activate<decltype(act)::value>(get(pu + k)));
          });
        });
      });
    });
  });
}

template <class A>
Error run_activate_backward(const Lines& lines, const Tensor4& da, const Tensor4& u, const Tensor4& du,
                            const Tensor4& a, const Tensor4& out, Activation activation) {
  const PartialSums<A> sums = make_sums<A>(lines, u.size[1]);
  if (!sums.data) return kOutOfMemory;
  const Error error = for_each_share(lines, sums, 0, [&](A* part, int64_t begin, int64_t end, A*) {
    with_types<A>(u.dtype, lines.planes, [&](auto type, auto planes) {
      typedef decltype(type) T;
      constexpr bool kPlanes = decltype(planes)::value;
      const Operand<const T> grads(da, lines), from(u, lines);
      const Operand<T> to(du, lines), activated(a.data ? a : du, lines);
      with_activation(activation, [&](auto act) {
        for_each_line(lines, begin, end, [&](int64_t n, int64_t i) {
          const T *pg = grads.at(n, i), *pu = from.at(n, i);
          T *pdu = to.at(n, i), *pa = activated.at(n, i);
          A* own = kPlanes ? part + n * sums.step + i : part;
          sum_line<A, kPlanes>(lines.length, own, [&](int64_t k, const auto& get, const auto& put) {
            Vec<A> y;
            const Vec<A> v = activate_backward<decltype(act)::value>(Vec<A>(get(pg + k)), Vec<A>(get(pu + k)), &y);
            put(pdu + k, v);
            if (a.data) put(pa + k, y);
            return v;
          });
        });
      });
    });
  });
  if (!error && out.data) sums.total(out);
  return error;
}

Error forward(const Tensor4& u, const Tensor4& a, Activation act) {
  Lines lines;
  if (Error error = find_lines(&lines, u, a)) return error;
  return (u.dtype == kFloat64 ? run_activate<double> : run_activate<float>)(lines, u, a, act);
}
Error backward(const Tensor4& da, const Tensor4& u, const Tensor4& du, const Tensor4& a, const Tensor4& sums,
               Activation act) {
  Lines lines;
  if (Error error = find_lines(&lines, da, u, du, a.data ? a : du)) return error;
  return (u.dtype == kFloat64 ? run_activate_backward<double> : run_activate_backward<float>)(lines, da, u, du, a, sums,
                                                                                              act);
}

}  // namespace

extern const MlpOps mlp_ops;
const MlpOps mlp_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
