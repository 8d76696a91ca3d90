// Attention between channels: products over the tokens and what becomes of them. GEMMs over all channels are torch's.
#pragma once
#include "tensor.h"

namespace vops {

// Tokens are (B, heads, d, N) with any strides. What belongs to a head is contiguous and float32, float64 for float64:
// matrices (B, heads, d, d), and vectors of both operands, (B, 2, heads, d). The temperature is a (1, heads, 1, 1)
// view.
struct CrossCovarianceOps {
  // gram = a b^T; norms = the diagonals of a u^T and b v^T. With u = a and v = b these are squared norms, and nothing
  // is read twice. Norms, u and v may be absent together. Bitwise repeatable, whatever the threads.
  Error (*gram)(const Tensor4& a, const Tensor4& b, const Tensor4& u, const Tensor4& v, const Tensor4& gram,
                const Tensor4& norms);
  // weights = softmax(temperature * gram / |a| / |b|), with norms of 1e-12 at least.
  Error (*softmax)(const Tensor4& gram, const Tensor4& norms, const Tensor4& temperature, const Tensor4& weights);
  // In place, the gradient of the weights becomes that of the gram. scales = twice the gradients of the squared norms;
  // dtemperature, (B, heads, 1, 1), is not yet summed over the batch.
  Error (*softmax_backward)(const Tensor4& grad, const Tensor4& weights, const Tensor4& gram, const Tensor4& norms,
                            const Tensor4& temperature, const Tensor4& scales, const Tensor4& dtemperature);
  // y = matrix x, or its transpose times x, plus scale * z. scale is (B, heads, d, 1) with any strides; it may be
  // absent together with z.
  Error (*apply)(const Tensor4& matrix, bool transposed, const Tensor4& x, const Tensor4& scale, const Tensor4& z,
                 const Tensor4& y);
  // sums = those of x over its tokens, contiguous float64; centred = x less its mean in float32, may be absent. x and
  // centred are float32 (B, C, N, 1) views, whose channels are neighbours.
  Error (*sum_tokens)(const Tensor4& x, const Tensor4& sums, const Tensor4& centred);
};

}  // namespace vops
