// LayerNorm over the channels of every pixel: y[n, c, i, j] = (x[n, c, i, j] - mean) * rstd * w[c] + b[c], where mean
// and the variance in rstd = 1 / sqrt(variance + eps) are those of x[n, :, i, j].
#pragma once
#include "tensor.h"

namespace vops {

// Weights, biases and their gradients are (1, C, 1, 1) views; y and dy may be of a half type beside a float32 x.
struct LayerNorm2dOps {
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, double eps);
  // Any gradient may be absent. Statistics are computed again; dw and db are bitwise repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx, const Tensor4& dw,
                    const Tensor4& db, double eps);
};

}  // namespace vops
