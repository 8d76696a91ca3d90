// What the two kernels of a norm over channels share.
#pragma once
#include "lines.h"

namespace vops {
namespace VOPS_ISA {

template <class A>
struct Norm {
  const A *weight, *bias;  // padded with zeros to whole blocks; bias is for the forward pass only
  int64_t channels;
  double eps;
  int64_t full() const { return channels / kLanes; }
  int tail() const { return (int)(channels % kLanes); }
  A inverse_count() const { return (A)(1. / channels); }
};

// Zeroes the lanes from n on: those after the last channel.
template <class A>
VOPS_INLINE Vec<A> first_lanes(Vec<A> v, int n) {
  for (int k = 0; k < kLanes; k++) v[k] = k < n ? v[k] : 0;
  return v;
}

}  // namespace VOPS_ISA
}  // namespace vops
