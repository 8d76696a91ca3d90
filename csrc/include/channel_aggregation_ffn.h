// The depthwise part of MogaNet's channel aggregation: h = gelu(conv(f) + b), the score of every pixel, which is c and
// the sum of v[k] * h[k] over its channels, and d = gelu(score). The matrix products around it are those of pointwise.h
// or torch's.
#pragma once
#include "dwconv.h"

namespace vops {

// Any of them may be absent but df and dv. df_sums: df summed over the pixels, the gradient of a bias before f.
struct ChannelAggregationFfnGrads {
  Tensor4 df, dw, db, dv, dc, df_sums;
};

// f, h, dh and df are channels_last. d has one channel, or a second one for what its type rounds off, side by side. The
// scores and dd are (N, 1, H, W) and contiguous, in the type of the sums: float, or double for double. v and dv are (1,
// C, 1, 1) views, as the biases. The convolution has stride and dilation 1, and keeps the width. Bitwise repeatable,
// whatever the threads.
struct ChannelAggregationFfnOps {
  Error (*forward)(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& c,
                   const Tensor4& h, const Tensor4& d, const Tensor4& scores, DwConv conv);
  // Of the gradients dd and dh, which is without d's share; h and d once more. dh, dd and the scores have the rows of
  // the convolution's result, of which those from `first` on are rows of h, d and df; f has what all of them read.
  Error (*backward)(const Tensor4& f, const Tensor4& w, const Tensor4& b, const Tensor4& v, const Tensor4& scores,
                    const Tensor4& dd, const Tensor4& dh, const Tensor4& h, const Tensor4& d,
                    const ChannelAggregationFfnGrads& grads, int64_t first, DwConv conv);
};

}  // namespace vops
