// A depthwise convolution and the LayerNorm over the channels of every pixel of its output: u = conv(x) + b, y = (u -
// mean) * rstd * ln_w + ln_b.
#pragma once
#include "dwconv.h"

namespace vops {

// The gradients that are asked for; absent ones have null data.
struct DwConvLayerNormGrads {
  Tensor4 dx, weight, bias, ln_weight, ln_bias;
};

// The convolution keeps the size. y and dy are dense with neighbouring channels, (N, H, W, C) in memory. statistics is
// (2, N, H, W), dense, in the accumulation type: all means, then all rstds.
struct DwConvLayerNormOps {
  // statistics, for the backward pass, may be absent.
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w, const Tensor4& ln_b,
                   const Tensor4& y, const Tensor4& statistics, DwConv conv, double eps);
  // Bitwise repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w,
                    const Tensor4& statistics, const DwConvLayerNormGrads& grads, DwConv conv);
};

}  // namespace vops
