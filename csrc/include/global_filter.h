// The global filter of GFNet and HorNet: y = irfft2(rfft2(x) * w), on every plane of (N, C, H, W).
#pragma once
#include "tensor.h"

namespace vops {

// w and dw are (1, C, H, 2 * (W / 2 + 1)) views: real and imaginary parts of a frequency are neighbouring columns.
struct GlobalFilterOps {
  Error (*forward)(const Tensor4& x, const Tensor4& w, const Tensor4& y);
  // dx or dw may be absent. Bitwise repeatable, whatever the threads.
  Error (*backward)(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx, const Tensor4& dw);
};

}  // namespace vops
