// The depthwise engine: y[n, c, i, j] = act(b[c] + sum_{k, l} w[c, k, l] * x[n, c, i*stride - pad_top + k*dilation,
// ...]). A channel slice is a Tensor4 whose data and strides select it; nothing is copied.
#pragma once
#include "activation.h"
#include "tensor.h"

namespace vops {

struct DwConv {
  int64_t kernel, stride, dilation, pad_top, pad_left;
};

// Weights are (1, C, 1, K*K) views, biases (1, C, 1, 1) views.
struct DwConvOps {
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, DwConv conv, Activation act);
  // du = dy * act'(conv(x) + b): what the two passes below take in place of dy when there is an activation.
  Error (*backward_activation)(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b,
                               const Tensor4& du, DwConv conv, Activation act);
  Error (*backward_input)(const Tensor4& dy, const Tensor4& w, const Tensor4& dx, DwConv conv);
  // dw or db may be absent. Bitwise repeatable: the order of the sums does not depend on the number of threads.
  Error (*backward_weight)(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db, DwConv conv);
};

}  // namespace vops
