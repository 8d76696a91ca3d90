// MogaNet's multi-order depthwise convolution: x0 = dwconv[0](x), out = cat(x0[:c0], dwconv[1](x0[c0:c0+c1]),
// dwconv[2](x0[c0+c1:])).
#pragma once
#include "dwconv.h"

namespace vops {

struct MultiOrderDwConv {
  DwConv conv[3];  // stride 1, padded to keep the size
  Tensor4 weight[3], bias[3];
};

// The gradients that are asked for; absent ones have null data.
struct MultiOrderDwConvGrads {
  Tensor4 dx, weight[3], bias[3];
};

struct MultiOrderDwConvOps {
  Error (*forward)(const Tensor4& x, const MultiOrderDwConv& p, const Tensor4& y);
  Error (*backward)(const Tensor4& dy, const Tensor4& x, const MultiOrderDwConv& p, const MultiOrderDwConvGrads& grads);
};

}  // namespace vops
