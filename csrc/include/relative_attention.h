// Attention between the positions of a map, or of its windows, with a bias by relative position.
#pragma once
#include "tensor.h"

namespace vops {

// The map, and windows that tile it; those at its lower and right ends may be smaller.
struct RelativeAttention {
  int64_t height, width, window_height, window_width;
  double scale;
};

// q, k, v, y and their gradients are (B, heads, height * width, d) with any strides. The table and its gradient are
// contiguous (1, heads, 2 * window_height - 1, 2 * window_width - 1), float32, or float64 for float64; both may be
// absent. So may any other gradient. lse, of that type, is contiguous (1, B, heads, height * width).
struct RelativeAttentionOps {
  // y = softmax(scale * q k^T + bias) v; lse = the logarithm of what the softmax divides by.
  Error (*forward)(const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& table,
                   const RelativeAttention& attention, const Tensor4& y, const Tensor4& lse);
  // Bitwise repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& q, const Tensor4& k, const Tensor4& v, const Tensor4& table,
                    const RelativeAttention& attention, const Tensor4& lse, const Tensor4& dq, const Tensor4& dk,
                    const Tensor4& dv, const Tensor4& dtable);
};

}  // namespace vops
