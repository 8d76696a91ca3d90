// GELU and its slope for several vectors at once, where it is much of the time of a pass.
#pragma once
#include "activations.h"

namespace vops {
namespace VOPS_ISA {

// Vectors that go through a polynomial side by side: every multiply-add waits for the one before it.
constexpr int kJam = 4;
// Calls f(block, how many blocks from there on).
template <int jam, class F>
VOPS_INLINE void for_each_jam(int64_t blocks, const F& f) {
  int64_t b = 0;
  for (; b + jam <= blocks; b += jam) f(b, Constant<jam>());
  for (; b < blocks; b++) f(b, Constant<1>());
}

// u becomes h.
template <int N>
VOPS_INLINE void gelu_of(Float (&u)[N]) {
  Float cdf[N];
  fast_normal_cdf(u, cdf);
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) u[i] *= cdf[i];
}
template <int N>
VOPS_INLINE void gelu_of(Double (&u)[N]) {
  for (int i = 0; i < N; i++) u[i] = gelu(u[i]);
}
// And slope = gelu'(u).
template <int N>
VOPS_INLINE void gelu_and_slope(Float (&u)[N], Float (&slope)[N]) {
  fast_normal_cdf(u, slope);
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) {
    const Float exponent = u[i] * u[i] * -.5f, h = u[i] * slope[i];
    Int n;
    const Float p = exp_reduced(exponent < -87.f ? splat(-87.f) : exponent, n);
    slope[i] += u[i] * 0.39894228040f * (p * (Float)((n + 127) << 23));
    u[i] = h;
  }
}
template <int N>
VOPS_INLINE void gelu_and_slope(Double (&u)[N], Double (&slope)[N]) {
  for (int i = 0; i < N; i++) slope[i] = gelu_grad(u[i]), u[i] = gelu(u[i]);
}

}  // namespace VOPS_ISA
}  // namespace vops
