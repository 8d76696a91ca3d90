#include "activations.h"
#include "lines.h"
#include "mlp.h"

namespace vops {
namespace VOPS_ISA {
namespace {

constexpr int64_t kActivationWork = 24;  // of an element, in multiply-adds

Error forward(const Tensor4& u, const Tensor4& a, Activation activation) {
  Lines lines;
  if (Error error = find_lines(&lines, u, a)) return error;
  return with_sum_type(u.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    return for_each_part_of_any<A>(lines, u.dtype, kActivationWork, [&](auto part) {
      const auto from = part.in(u);
      const auto to = part.out(a);
      with_activation(activation, [&](auto act) {
        for (int64_t i = part.begin; i < part.end; i++) {
          const auto* pu = from[i];
          auto* pa = to[i];
          for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
            put(pa + k, activate<decltype(act)::value>(get(pu + k)));
          });
        }
      });
    });
  });
}

Error backward(const Tensor4& da, const Tensor4& u, const Tensor4& du, const Tensor4& a, const Tensor4& out,
               Activation activation) {
  Lines lines;
  if (Error error = find_lines(&lines, da, u, du, a.data ? a : du)) return error;
  return with_sum_type(u.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const PartialSums<A> sums = make_sums<A>(lines, u.size[1], 1);
    if (!sums.data) return kOutOfMemory;
    const Error error = for_each_part<A>(lines, u.dtype, sums, kActivationWork, [&](auto part) {
      const auto grads = part.in(da), from = part.in(u);
      const auto to = part.out(du), activated = part.out(a);
      A* const own = own_sums(part, sums);
      with_activation(activation, [&](auto act) {
        for (int64_t i = part.begin; i < part.end; i++) {
          const auto *pg = grads[i], *pu = from[i];
          auto *pdu = to[i], *pa = activated[i];
          add_line<1>(part, own, 0, i, [&](int64_t k, const auto& get, const auto& put, auto& values) {
            Vec<A> y;
            values[0] = activate_backward<decltype(act)::value>(Vec<A>(get(pg + k)), Vec<A>(get(pu + k)), &y);
            put(pdu + k, values[0]);
            if (pa) put(pa + k, y);
          });
        }
      });
    });
    if (!error && out.data) unpack_sums(lines, sums, out);
    return error;
  });
}

}  // namespace

extern const MlpOps mlp_ops;
const MlpOps mlp_ops = {forward, backward};

}  // namespace VOPS_ISA
}  // namespace vops
