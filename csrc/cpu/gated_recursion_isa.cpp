#include "gated_recursion.h"
#include "lines.h"

namespace vops {
namespace VOPS_ISA {
namespace {

Error gate(const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& p) {
  Lines lines;
  if (Error error = find_lines(&lines, u, q, p)) return error;
  return with_sum_type(u.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const ChannelRows<A> bias = make_coefficients<A>(u.size[1], 1);
    if (!bias.data) return kOutOfMemory;
    pack_bias(b, {0, u.size[1]}, bias[0], kLanes);
    return for_each_part<A>(lines, u.dtype, kElementWork, [&](auto part) {
      const auto from = part.in(u), by = part.in(q);
      const auto to = part.out(p);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *pu = from[i], *pq = by[i];
        auto* pp = to[i];
        for_each_vector(part, [&](int64_t k, const auto& get, const auto& put) {
          put(pp + k, (get(pu + k) + of_channel(part, bias[0], i, k)) * get(pq + k));
        });
      }
    });
  });
}

Error gate_backward(const Tensor4& dp, const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& du,
                    const Tensor4& dq, const Tensor4& db) {
  Lines lines;
  if (Error error = find_lines(&lines, dp, u, q, du, dq)) return error;
  return with_sum_type(u.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const ChannelRows<A> bias = make_coefficients<A>(u.size[1], 1);
    const PartialSums<A> sums = make_sums<A>(lines, u.size[1], 1);
    if (!bias.data || !sums.data) return kOutOfMemory;
    pack_bias(b, {0, u.size[1]}, bias[0], kLanes);
    const Error error = for_each_part<A>(lines, u.dtype, sums, kElementWork, [&](auto part) {
      const auto grads = part.in(dp), from = part.in(u), by = part.in(q);
      const auto to_u = part.out(du), to_q = part.out(dq);
      A* const own = own_sums(part, sums);
      for (int64_t i = part.begin; i < part.end; i++) {
        const auto *pg = grads[i], *pu = from[i], *pq = by[i];
        auto *pdu = to_u[i], *pdq = to_q[i];
        add_line<1>(part, own, 0, i, [&](int64_t k, const auto& get, const auto& put, auto& values) {
          const Vec<A> g = get(pg + k), biased = get(pu + k) + of_channel(part, bias[0], i, k);
          values[0] = g * get(pq + k);
          put(pdu + k, values[0]);
          put(pdq + k, g * biased);
        });
      }
    });
    if (!error && db.data) unpack_sums(lines, sums, db);
    return error;
  });
}

Error channel_sums(const Tensor4& t, const Tensor4& out) {
  Lines lines;
  if (Error error = find_lines(&lines, t)) return error;
  return with_sum_type(t.dtype, [&](auto zero) {
    typedef decltype(zero) A;
    const PartialSums<A> sums = make_sums<A>(lines, t.size[1], 1);
    if (!sums.data) return kOutOfMemory;
    const Error error = add_pixels(lines, t, sums);
    if (!error) unpack_sums(lines, sums, out);
    return error;
  });
}

}  // namespace

extern const GatedRecursionOps gated_recursion_ops;
const GatedRecursionOps gated_recursion_ops = {gate, gate_backward, channel_sums};

}  // namespace VOPS_ISA
}  // namespace vops
