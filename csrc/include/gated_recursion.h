// The gates of HorNet's recursion; its matrix products are those of pointwise.h or torch's.
#pragma once
#include "tensor.h"

namespace vops {

// All tensors have the same sizes, but for the biases and their gradients, which are (1, C, 1, 1) views and may be
// absent.
struct GatedRecursionOps {
  // p = (u + b) * q. p may be u.
  Error (*gate)(const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& p);
  // Of the gradient dp: du = dp * q, dq = dp * (u + b), db = the sum of du over the pixels. du may be u. Bitwise
  // repeatable, whatever the threads.
  Error (*gate_backward)(const Tensor4& dp, const Tensor4& u, const Tensor4& b, const Tensor4& q, const Tensor4& du,
                         const Tensor4& dq, const Tensor4& db);
  // sums = the sums of t over the pixels.
  Error (*channel_sums)(const Tensor4& t, const Tensor4& sums);
};

}  // namespace vops
