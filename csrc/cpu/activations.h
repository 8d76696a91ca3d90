// Activations of vectors, in float32 and float64: act(v), and dy * act'(v) with or without act(v).
#pragma once
#include "activation.h"
#include "vec.h"

namespace vops {
namespace VOPS_ISA {

template <class V>
VOPS_INLINE V clamped(V v, V low, V high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

template <Activation act, class V>
VOPS_INLINE V activate(V v) {
  if constexpr (act == kGelu) return gelu(v);
  if constexpr (act == kSilu) return silu(v);
  if constexpr (act == kHardswish) return v * clamped(v + 3, V{}, V{} + 6) / 6;
  return v;
}

// dy * act'(v), and act(v).
template <Activation act, class V>
VOPS_INLINE V activate_backward(V dy, V v, V* activated) {
  if constexpr (act != kSilu) *activated = activate<act>(v);
  if constexpr (act == kGelu) return dy * gelu_grad(v);
  if constexpr (act == kSilu) {
    const V divisor = 1 + exp(-v), s = 1 / divisor;
    *activated = v / divisor;
    return dy * (s * (1 + v * (1 - s)));
  }
  // PyTorch's slope is 0 at -3 and 1 at 3.
  if constexpr (act == kHardswish) return v <= -3 ? V{} : v < 3 ? dy * (v / 3 + .5) : dy;
  return dy;
}
template <Activation act, class V>
VOPS_INLINE V activate_backward(V dy, V v) {
  V unused;
  return activate_backward<act>(dy, v, &unused);
}

template <Activation act>
struct ActivationIs {
  static constexpr Activation value = act;
};
// Calls f(ActivationIs<act>()).
template <class F>
VOPS_INLINE void with_activation(Activation act, const F& f) {
  if (act == kGelu) f(ActivationIs<kGelu>());
  if (act == kSilu) f(ActivationIs<kSilu>());
  if (act == kHardswish) f(ActivationIs<kHardswish>());
  if (act == kNoActivation) f(ActivationIs<kNoActivation>());
}

}  // namespace VOPS_ISA
}  // namespace vops
