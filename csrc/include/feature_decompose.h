// MogaNet's feature decomposition: y = act(x + sigma[c] * (x - mean[n, c])), where mean is that of x[n, c].
#pragma once
#include "dwconv.h"

namespace vops {

// The means are (N, C, 1, 1) and contiguous, in the type of the sums: float, or double for double. sigma and its
// gradient are (1, C, 1, 1) views.
struct FeatureDecomposeOps {
  Error (*means)(const Tensor4& x, const Tensor4& mean);
  Error (*forward)(const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& y, Activation act);
  // Either gradient may be absent; dx may be dy. Bitwise repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& x, const Tensor4& mean, const Tensor4& sigma, const Tensor4& dx,
                    const Tensor4& dsigma, Activation act);
};

}  // namespace vops
