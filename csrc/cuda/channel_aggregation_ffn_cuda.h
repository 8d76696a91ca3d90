// MogaNet's channel aggregation between fc1 and fc2 on CUDA, for 3x3 convolutions of channels_last tensors: h =
// GELU(u), u = dwconv f, and the score of a pixel = decompose h. float32 and half types; scores and sums are float32.
#pragma once
#include "target.h"
#include "tensor.h"

namespace vops {

struct ChannelAggregation {
  Tensor4 w, b, decompose, decompose_bias;  // biases may be absent
};

bool has_aggregation_kernel(const Tensor4& f, int64_t kernel);

// scores, and h with d = GELU(score) in the channels behind it: rounded, what that took off, zeros.
Error channel_aggregation_cuda(const Tensor4& f, const ChannelAggregation& p, const Tensor4& h, const Tensor4& d,
                               const Tensor4& scores, void* workspace, CudaTarget target);
int64_t channel_aggregation_workspace(const Tensor4& f);  // in bytes

// Backward in two passes, each of which leaves its part of the sums over the pixels in rows of the workspace: of w
// [channel][tap], of b, of df, of decompose, and of decompose_bias. Their number is the shape's.
// First h again, and dh becomes du = (dh + decompose * dscores) * GELU'(u).
Error channel_aggregation_backward_cuda(const Tensor4& f, const ChannelAggregation& p, const Tensor4& dscores,
                                        const Tensor4& h, const Tensor4& dh, void* workspace, CudaTarget target);
// Then df.
Error channel_aggregation_backward_input_cuda(const Tensor4& du, const Tensor4& f, const Tensor4& w, const Tensor4& df,
                                              void* workspace, CudaTarget target);
int64_t channel_aggregation_backward_workspace(const Tensor4& f);

}  // namespace vops
