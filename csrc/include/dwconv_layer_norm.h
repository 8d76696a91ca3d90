// A depthwise convolution and the LayerNorm over the channels of every pixel of its output: u = conv(x) + b, y = (u -
// mean) * rstd * ln_w + ln_b.
#pragma once
#include "dwconv.h"

namespace vops {

// y, dy, u and du are dense with neighbouring channels, (N, H, W, C) in memory. statistics is (2, N, H, W), dense, in
// the accumulation type: all means, then all rstds.
struct DwConvLayerNormOps {
  // The convolution keeps the size. u and statistics, for the backward pass, may both be absent.
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& ln_w, const Tensor4& ln_b,
                   const Tensor4& y, const Tensor4& u, const Tensor4& statistics, DwConv conv, double eps);
  // Of the norm only; the rest is the depthwise engine's. Any gradient may be absent. Bitwise repeatable, whatever the
  // threads.
  Error (*backward_norm)(const Tensor4& dy, const Tensor4& u, const Tensor4& statistics, const Tensor4& ln_w,
                         const Tensor4& du, const Tensor4& dln_w, const Tensor4& dln_b);
};

}  // namespace vops
