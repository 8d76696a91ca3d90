// The depthwise part of MogaNet's channel aggregation: h = gelu(conv(f) + b) and the score of every pixel, the sum of
// v[c] * h[c] over its channels. The matrix products around it are those of pointwise.h or torch's.
#pragma once
#include "dwconv.h"

namespace vops {

// f, h, dh and g are channels_last, the scores (N, 1, H, W) and contiguous, in the type of the sums: float, or double
// for double. v and dv are (1, C, 1, 1) views, as the biases. The convolution keeps the size. Bitwise repeatable,
// whatever the threads.
struct ChannelAggregationFfnOps {
  Error (*forward)(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& h,
                   const Tensor4& scores, DwConv conv);
  // Of the gradients dh and dscores: du = (dh + v * dscores) * gelu'(conv(f) + b), over dh; h once more; dv, in the
  // type of the sums.
  Error (*backward)(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& dscores,
                    const Tensor4& dh, const Tensor4& h, const Tensor4& dv, DwConv conv);
};

}  // namespace vops
