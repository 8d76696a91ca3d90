// EdgeNeXt's cascade over splits s_i of the channels of x: y_0 = conv_0(s_0), y_i = conv_i(y_{i-1} + s_i), out =
// cat(y_0,
// ..., y_{levels-1}, what is left of x).
#pragma once
#include "dwconv.h"

namespace vops {

// Of every level, a convolution that keeps the size; `levels` of each.
struct SplitCascade {
  DwConv conv;
  int64_t levels;
  const Tensor4 *weight, *bias;
};

// The gradients that are asked for; absent ones have null data.
struct SplitCascadeGrads {
  Tensor4 dx;
  const Tensor4 *weight, *bias;
};

struct SplitCascadeOps {
  Error (*forward)(const Tensor4& x, const SplitCascade& p, const Tensor4& y);
  // Bitwise repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& x, const SplitCascade& p, const SplitCascadeGrads& grads);
};

}  // namespace vops
