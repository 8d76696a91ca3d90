// 1x1 convolutions: matrix products over the channels of every pixel, in float32.
#pragma once
#include "activation.h"
#include "tensor.h"

namespace vops {

// What becomes of a product p = W x + b.
enum Combine : int {
  kNothing = 0,
  kPlus = 1,              // y = p + z
  kTimes = 2,             // y = p * z
  kActivate = 3,          // y = act(p), and kept = p
  kActivateBackward = 4,  // y = p * act'(z), and kept = act(z)
  kScale = 5,             // y = z + path_scale[n] * gamma[c] * p
};

// What it is combined with. z and kept lie as y does; kept, gamma (1, O, 1, 1) and path_scale (N, 1, 1, 1) may be
// absent. z may be y, but for kTimes. The numbers of y do not depend on whether kept is there.
struct Ending {
  Combine combine;
  Activation act;
  Tensor4 z, kept, gamma, path_scale;
};

// All pixels of an image have one stride, in every tensor; channels and images have any, but the neighbours of y in
// memory are its channels or its pixels. Matrices are (1, 1, O, I) with any strides, biases (1, O, 1, 1) views; or
// every image has its own, (N, 1, O, I), and y's channels are neighbours. Its bias may then be its own, too, (N, O, 1,
// 1).
struct PointwiseOps {
  // y = W x + b combined as `end` says. b may be absent.
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Ending& end, const Tensor4& y);
  // W x + b in two steps, for several x, where the neighbours of y are its channels. packed has
  // packed_size(outputs, inputs) elements.
  int64_t (*packed_size)(int64_t outputs, int64_t inputs);
  Error (*pack)(const Tensor4& w, const Tensor4& b, float* packed);
  Error (*forward_packed)(const Tensor4& x, const float* packed, const Tensor4& y);
  // dW = the sum over the pixels of dy times x, of all images or of each; its columns are neighbours in memory. db =
  // the sum of dy over all pixels. Either may be absent: the numbers of the other are the same.
  Error (*backward_weight)(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db);
};

}  // namespace vops
