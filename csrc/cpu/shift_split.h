// What the passes of S2-MLPv2's attention share: its small tensors, and the quarters of its channels.
#pragma once
#include "parallel.h"
#include "shift_split_attention.h"

namespace vops {
namespace VOPS_ISA {

// Image n of a small tensor (N, K, 1, C).
template <class A>
VOPS_INLINE A* small(const Tensor4& t, int64_t n) {
  return (A*)t.data + n * t.size[1] * t.size[3];
}

// Channels [begin, end) of a branch, and how far away a pixel of branch 1 or 2 comes from, along one axis.
struct Quarter {
  int64_t begin, end;
  int step;
  bool vertical[2];
};
VOPS_INLINE Quarter quarter(int64_t channels, int64_t q) {
  const bool first = q < 2;
  return {channels * q / 4, channels * (q + 1) / 4, q % 2 ? 1 : -1, {first, !first}};
}

// In shift_split_weights_isa.cpp.
Error pool(const Tensor4& sums, const Tensor4& pooled);
Error pool_linear(const Tensor4& sums, const Tensor4& mlp1, const Tensor4& b, int64_t pixels, const Tensor4& pooled);
Error branch_weights(const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2, const Tensor4& hidden,
                     const Tensor4& weights);
Error branch_weights_backward(const Tensor4& dweights, const Tensor4& weights, const Tensor4& hidden,
                              const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2, const Tensor4& dmlp1,
                              const Tensor4& dmlp2, const Tensor4& dpooled);

}  // namespace VOPS_ISA
}  // namespace vops
