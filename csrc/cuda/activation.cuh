#pragma once
#include <cmath>

#include "dwconv.h"
#include "toolchain.h"

namespace vops {

template <class A>
__device__ __forceinline__ A gelu_and_slope(A x, A* slope) {
  const A cdf = A(0.5) * (A(1) + std::erf(x * A(0.70710678118654752440)));
  *slope = cdf + x * (std::exp(A(-0.5) * x * x) * A(0.39894228040143267794));
  return x * cdf;
}

template <class A>
__device__ __forceinline__ A activate(A x, Activation act) {
  if (act == kGelu) return A(0.5) * x * (A(1) + std::erf(x * A(0.70710678118654752440)));
  if (act == kSilu) return x / (A(1) + std::exp(-x));
  return x;
}

template <class A>
__device__ __forceinline__ A activation_slope(A x, Activation act) {
  if (act == kGelu) {
    A slope;
    gelu_and_slope(x, &slope);
    return slope;
  }
  if (act == kSilu) {
    const A s = A(1) / (A(1) + std::exp(-x));
    return s * (A(1) + x * (A(1) - s));
  }
  return A(1);
}

}  // namespace vops
