// What an MLP has between its products where these are PyTorch's; our own end in it (pointwise.h).
#pragma once
#include "activation.h"
#include "tensor.h"

namespace vops {

// Maps have the same sizes and dtype.
struct MlpOps {
  // a = act(u). a may be u.
  Error (*activate)(const Tensor4& u, const Tensor4& a, Activation act);
  // du = da * act'(u), a = act(u), sums = the sum of du over the pixels, a (1, C, 1, 1) view, bitwise repeatable,
  // whatever the threads. a and sums may be absent. du may be da.
  Error (*activate_backward)(const Tensor4& da, const Tensor4& u, const Tensor4& du, const Tensor4& a,
                             const Tensor4& sums, Activation act);
};

}  // namespace vops
