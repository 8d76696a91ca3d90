// 1x1 convolutions: matrix products over the channels of every pixel, in float32.
#pragma once
#include "tensor.h"

namespace vops {

// What becomes of a product and another tensor z.
enum Combine : int { kNothing = 0, kPlus = 1, kTimes = 2 };

// All pixels of an image have one stride, in every tensor; channels and images have any, but the neighbours of y in
// memory are its channels or its pixels. Matrices are (1, 1, O, I) with any strides, biases (1, O, 1, 1) views; or
// every image has its own, (N, 1, O, I), and y's channels are neighbours. Its bias may then be its own, too, (N, O, 1,
// 1).
struct PointwiseOps {
  // y = (W x + b) combined with z, which lies as y does. b may be absent, and z is where there is nothing to combine. z
  // may be y, to be added.
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& z, Combine combine,
                   const Tensor4& y);
  // The same in two steps, for several x, where the neighbours of y are its channels. packed has
  // packed_size(outputs, inputs) elements.
  int64_t (*packed_size)(int64_t outputs, int64_t inputs);
  Error (*pack)(const Tensor4& w, const Tensor4& b, float* packed);
  Error (*forward_packed)(const Tensor4& x, const float* packed, const Tensor4& y);
  // dW = the sum over the pixels of dy times x, of all images or of each. Its columns are neighbours in memory.
  Error (*backward_weight)(const Tensor4& dy, const Tensor4& x, const Tensor4& dw);
};

}  // namespace vops
