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

// All of the op in float32, with the products of pointwise.h, on CPUs: f = fc1 x, h and d from f as above, y = fc2 [h |
// d]. Matrices and biases are as there.
struct ChannelAggregationFfn {
  Tensor4 x, fc1, fc1_bias, dw, dw_bias, decompose, decompose_bias, fc2, fc2_bias;
};
// So many images at once, or so many rows of one.
struct ChannelAggregationFfnChunks {
  int64_t images, rows;
};
// Of hidden channels: h, with one for d behind them, and its gradient, with rows around, and that of f.
struct ChannelAggregationFfnBuffers {
  Tensor4 h, dh, df;
};
// Gradients that are sums over all pixels, contiguous; any may be absent but that of decompose. fc2: of [h | d].
struct ChannelAggregationFfnTotals {
  Tensor4 fc1, fc1_bias, dw, dw_bias, decompose, decompose_bias, fc2;
};
// f has all images and rows, to be kept, or those of a chunk and around it; h those of a chunk.
Error channel_aggregation_ffn(const ChannelAggregationFfn& a, ChannelAggregationFfnChunks chunks, const Tensor4& f,
                              const Tensor4& h, const Tensor4& scores, const Tensor4& y);
// kept: whether f is what the other has left there, else it is a buffer. dx may be absent.
Error channel_aggregation_ffn_backward(const ChannelAggregationFfn& a, ChannelAggregationFfnChunks chunks,
                                       const Tensor4& dy, const Tensor4& scores, const Tensor4& f, bool kept,
                                       const ChannelAggregationFfnBuffers& buffers, const Tensor4& dx,
                                       const ChannelAggregationFfnTotals& totals);

}  // namespace vops
