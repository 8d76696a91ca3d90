// MogaNet's gate: y = silu(g) * silu(v), or with silu twice on both.
#pragma once
#include "tensor.h"

namespace vops {

// All tensors have the same sizes.
struct MogaGateOps {
  Error (*forward)(const Tensor4& g, const Tensor4& v, const Tensor4& y, bool doubled);
  // Either gradient may be absent. They may be g and v.
  Error (*backward)(const Tensor4& dy, const Tensor4& g, const Tensor4& v, const Tensor4& dg, const Tensor4& dv,
                    bool doubled);
};

}  // namespace vops
