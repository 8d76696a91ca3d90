// GELU and its slope for several vectors at once, where it is much of the time of a pass.
#pragma once
#include "vec.h"

namespace vops {
namespace VOPS_ISA {

// The normal distribution function is 1/2 and an odd function of u, here u times a polynomial of u^2, fitted on
// [-5.5, 5.5] with an error of 1e-7. vec.h's form, which is exact relative to tails of 1e-20, takes twice the time, and
// gelu is half the time of the forward pass.
constexpr float kTail = 5.5f;
constexpr int kTerms = 16;
constexpr float kPolynomial[kTerms] = {
    0.1285519301891327f,    -0.06417234241962433f,   0.04773762822151184f,   -0.03879278153181076f,
    0.03207026422023773f,   -0.026048293337225914f,  0.02036452665925026f,   -0.014998910948634148f,
    0.010227952152490616f,  -0.006820345763117075f,  0.004621581640094519f,  -0.002418042393401265f,
    0.0007202630513347685f, -0.0005295611335895956f, 0.0006315109203569591f, -0.00023629680799786001f};

// Vectors that go through a polynomial side by side: every multiply-add waits for the one before it.
constexpr int kJam = 4;
template <int count>
struct Count {
  static constexpr int value = count;
};
// Calls f(block, how many blocks from there on).
template <int jam, class F>
VOPS_INLINE void for_each_jam(int64_t blocks, const F& f) {
  int64_t b = 0;
  for (; b + jam <= blocks; b += jam) f(b, Count<jam>());
  for (; b < blocks; b++) f(b, Count<1>());
}

template <int N>
VOPS_INLINE void fast_normal_cdf(const Float (&u)[N], Float (&cdf)[N]) {
  Float mapped[N], square[N], odd[N];  // of the powers of `mapped`, even ones and odd ones are summed apart
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) {
    mapped[i] = u[i] * u[i] * (2 / (kTail * kTail)) - 1.f;  // to [-1, 1] inside
    square[i] = mapped[i] * mapped[i];
    cdf[i] = splat(kPolynomial[kTerms - 2]);
    odd[i] = splat(kPolynomial[kTerms - 1]);
  }
#pragma GCC unroll 16
  for (int k = kTerms - 4; k >= 0; k -= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
      cdf[i] = cdf[i] * square[i] + kPolynomial[k];
      odd[i] = odd[i] * square[i] + kPolynomial[k + 1];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) {
    const Float inside = u[i] * (odd[i] * mapped[i] + cdf[i]) + .5f;
    cdf[i] = u[i] < -kTail ? splat(0.f) : u[i] > kTail ? splat(1.f) : inside;
  }
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
