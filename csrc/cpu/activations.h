// Activations of vectors, in float32 and float64: act(v), and dy * act'(v) with or without act(v).
#pragma once
#include "activation.h"
#include "vec.h"

namespace vops {
namespace VOPS_ISA {

// The normal distribution function is 1/2 and an odd function of u, here u times a polynomial of u^2, fitted on
// [-5.5, 5.5] with an error of 1e-7. vec.h's form, which is exact relative to tails of 1e-20, takes twice the time, as
// long as a product of 32 channels.
constexpr float kTail = 5.5f;
constexpr int kTerms = 16;
constexpr float kPolynomial[kTerms] = {
    0.1285519301891327f,    -0.06417234241962433f,   0.04773762822151184f,   -0.03879278153181076f,
    0.03207026422023773f,   -0.026048293337225914f,  0.02036452665925026f,   -0.014998910948634148f,
    0.010227952152490616f,  -0.006820345763117075f,  0.004621581640094519f,  -0.002418042393401265f,
    0.0007202630513347685f, -0.0005295611335895956f, 0.0006315109203569591f, -0.00023629680799786001f};
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

VOPS_INLINE Float fast_normal_cdf(Float u) {
  const Float given[1] = {u};
  Float cdf[1];
  fast_normal_cdf(given, cdf);
  return cdf[0];
}

// dN(0, 1)/du
VOPS_INLINE Float normal_density(Float u) {
  const Float exponent = u * u * -.5f;
  Int n;
  const Float p = exp_reduced(exponent < -87.f ? splat(-87.f) : exponent, n);
  return p * (Float)((n + 127) << 23) * 0.39894228040f;
}

template <class V>
VOPS_INLINE V clamped(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Divisions take several times as long.
template <class V>
constexpr auto kSixth = (decltype(V{}[0] + 0))(1. / 6);

template <Activation act, class V>
VOPS_INLINE V activate(V v) {
  if constexpr (act == kGelu && sizeof(v[0]) == 4) return v * fast_normal_cdf(v);
  if constexpr (act == kGelu) return gelu(v);
  if constexpr (act == kSilu) return silu(v);
  if constexpr (act == kHardswish) return v * clamped(v + 3, V{}, V{} + 6) * kSixth<V>;
  return v;
}

// dy * act'(v), and act(v).
template <Activation act, class V>
VOPS_INLINE V activate_backward(V dy, V v, V* activated) {
  if constexpr (act == kGelu && sizeof(v[0]) == 4) {
    const Float cdf = fast_normal_cdf(v);
    *activated = v * cdf;
    return dy * (cdf + v * normal_density(v));
  }
  if constexpr (act != kSilu) *activated = activate<act>(v);
  if constexpr (act == kGelu) return dy * gelu_grad(v);
  if constexpr (act == kSilu) {
    const V divisor = 1 + exp(-v), s = 1 / divisor;
    *activated = v / divisor;
    return dy * (s * (1 + v * (1 - s)));
  }
  // PyTorch's slope is 0 at -3 and 1 at 3.
  if constexpr (act == kHardswish) return v <= -3 ? V{} : v < 3 ? dy * (v * (2 * kSixth<V>)+.5) : dy;
  return dy;
}
template <Activation act, class V>
VOPS_INLINE V activate_backward(V dy, V v) {
  V unused;
  return activate_backward<act>(dy, v, &unused);
}

// Of several vectors, whose polynomials go side by side: every multiply-add waits for the one before it.
template <Activation act, int N>
VOPS_INLINE void activate_all(Float (&v)[N]) {
  Float cdf[N];
  if constexpr (act == kGelu) fast_normal_cdf(v, cdf);
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) v[i] = act == kGelu ? v[i] * cdf[i] : activate<act>(v[i]);
}
// dy becomes dy * act'(v), and v act(v).
template <Activation act, int N>
VOPS_INLINE void activate_all_backward(Float (&dy)[N], Float (&v)[N]) {
  Float cdf[N];
  if constexpr (act == kGelu) fast_normal_cdf(v, cdf);
#pragma GCC unroll 4
  for (int i = 0; i < N; i++) {
    if constexpr (act == kGelu) {
      dy[i] *= cdf[i] + v[i] * normal_density(v[i]);
      v[i] *= cdf[i];
    } else {
      dy[i] = activate_backward<act>(dy[i], v[i], &v[i]);
    }
  }
}

// Calls f(Constant<act>()).
template <class F>
VOPS_INLINE void with_activation(Activation act, const F& f) {
  if (act == kGelu) f(Constant<kGelu>());
  if (act == kSilu) f(Constant<kSilu>());
  if (act == kHardswish) f(Constant<kHardswish>());
  if (act == kNoActivation) f(Constant<kNoActivation>());
}

}  // namespace VOPS_ISA
}  // namespace vops
