// S2-MLPv2's branches, moved by one pixel and added with weights; nothing moved is ever stored.
#pragma once
#include "tensor.h"

namespace vops {

struct LinearWeighLinear {
  Tensor4 x, mlp1, weights, offset, mlp2, bias;  // offset takes the bias of mlp1 in
  Tensor4 branches, weighed;                     // of some images at a time; all branches may be kept
};

// Maps have adjacent channels. x is three branches of C channels. Branches 1 and 2 are moved by one pixel, forward and
// back along one axis and then along the other, a quarter of the channels each: first along the height in branch 1,
// along the width in branch 2. What is at the border stays there, too.
//
// Per image there are small tensors, contiguous (N, K, 1, C) in the type of sums: float64 for float64, else float32.
// All sums are bitwise repeatable, whatever the threads.
struct ShiftSplitAttentionOps {
  // sums (K = 3) of any map: over all pixels; of the first row less the last; of the first column less the last.
  Error (*edge_sums)(const Tensor4& map, const Tensor4& sums);
  // pooled (K = 1) = sum of all moved(x)_k over the pixels, from the edge_sums of x: moving forward drops what is last
  // and doubles what is first, moving back does the opposite.
  Error (*pool)(const Tensor4& sums, const Tensor4& pooled);
  // The same of the branches mlp1 x + b, from the edge_sums of x, which has so many pixels. b may be absent.
  Error (*pool_linear)(const Tensor4& sums, const Tensor4& mlp1, const Tensor4& b, int64_t pixels,
                       const Tensor4& pooled);
  // weights (K = 3) = the softmax over k of mlp2 gelu(hidden), hidden (K = 1) = mlp1 pooled. The weights of the mlps
  // are (1, 1, O, I) views, neighbours along I.
  Error (*branch_weights)(const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2, const Tensor4& hidden,
                          const Tensor4& weights);
  // dweights: K = 3 or more, of which the first three. dmlp1 and dmlp2 may be absent.
  Error (*branch_weights_backward)(const Tensor4& dweights, const Tensor4& weights, const Tensor4& hidden,
                                   const Tensor4& pooled, const Tensor4& mlp1, const Tensor4& mlp2,
                                   const Tensor4& dmlp1, const Tensor4& dmlp2, const Tensor4& dpooled);
  // y = offset + sum_k weights_k * moved(x)_k; weights: K = 3, offset: K = 1, may be absent.
  Error (*weigh)(const Tensor4& x, const Tensor4& weights, const Tensor4& offset, const Tensor4& y);
  // y = mlp2 (offset + sum_k weights_k * moved(mlp1 x)_k) + bias, in float32.
  Error (*linear_weigh_linear)(const LinearWeighLinear& t, const Tensor4& y);
  // sums (K = 4): sum dy * moved(x)_k over the pixels, and sum dy. If y is not absent, it is computed again,
  // and only then is there an offset.
  Error (*weigh_backward_weights)(const Tensor4& dy, const Tensor4& x, const Tensor4& weights, const Tensor4& offset,
                                  const Tensor4& sums, const Tensor4& y);
  // dx = the gradient of sum(dy * y) + sum(dpooled * sum of all moved(x)_k over the pixels); dpooled: K = 1.
  Error (*weigh_backward_input)(const Tensor4& dy, const Tensor4& weights, const Tensor4& dpooled, const Tensor4& dx);
};

}  // namespace vops
