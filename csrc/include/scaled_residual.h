// What every half-block ends in: y = x + s[n] * g[c] * b, a residual, stochastic depth and layer scale.
#pragma once
#include "tensor.h"

namespace vops {

// Maps have the same sizes. g and its gradient are (1, C, 1, 1) views, s is a (1, N, 1, 1) one; each may be absent. x,
// y and dy have one dtype, b and db have it too or are half types beside float32.
struct ScaledResidualOps {
  // y may be x or b.
  Error (*forward)(const Tensor4& x, const Tensor4& b, const Tensor4& g, const Tensor4& s, const Tensor4& y);
  // db = s * g * dy, dg = the sum of s * dy * b over the pixels; each may be absent, and b where dg is. dg is bitwise
  // repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& b, const Tensor4& g, const Tensor4& s, const Tensor4& db,
                    const Tensor4& dg);
};

}  // namespace vops
