// What the passes of batch norm share.
#pragma once
#include "batch_norm_act.h"
#include "gelu.h"
#include "lines.h"

namespace vops {
namespace VOPS_ISA {

// Vectors side by side in backward passes, which hold more of each: four would not stay in 16 registers.
constexpr int kBackwardJam = kLanes == 16 ? kJam : 2;

// Calls f(offset, how many vectors, load, store, keep) for `length` numbers of a line, for `jam` vectors or for one;
// `keep` makes zeros of what is behind their end.
template <int jam, class T, class A, bool planes, class F>
VOPS_INLINE void for_each_group(const Part<T, A, planes>&, int64_t length, const F& f) {
  const auto get = [](const auto* p) { return load(p); };
  const auto put = [](auto* p, auto v) { store(p, v); };
  const auto all = [](auto v) { return v; };
  int64_t k = 0;
  for (; sizeof(A) == sizeof(float) && k + jam * kLanes <= length; k += jam * kLanes) {
    f(k, Constant<jam>(), get, put, all);
  }
  for (; k + kLanes <= length; k += kLanes) f(k, Constant<1>(), get, put, all);
  const int n = (int)(length - k);
  if (n == 0) return;
  f(
      k, Constant<1>(), [n](const auto* p) { return load_n(p, n); }, [n](auto* p, auto v) { store_n(p, v, n); },
      [n](auto v) {
        for (int lane = n; lane < kLanes; lane++) v[lane] = 0;
        return v;
      });
}

// In batch_norm_moments_isa.cpp.
Error batch_norm_moments(const Tensor4& x, const Tensor4& mean, const Tensor4& variance);

}  // namespace VOPS_ISA
}  // namespace vops
