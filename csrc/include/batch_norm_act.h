// Batch norm with an activation behind it, in passes: z = scale[c] * x + shift[c], y = act(z). What is between two
// passes, a few numbers per channel, is the caller's.
#pragma once
#include "dwconv.h"

namespace vops {

// Of every channel, contiguous, in the type of the sums: float, or double for double. Those of images are (N, C); gate
// and offset may be absent, which is 1 and 0.
struct BatchNormCoefficients {
  Tensor4 scale, shift, mean, gate, offset;
};

// Tensors have their channels, or the pixels of their planes, side by side, all the same. Bitwise repeatable, whatever
// the threads.
struct BatchNormActOps {
  // Mean and biased variance over images and pixels, of at least one: those of some pixels at a time, merged.
  Error (*moments)(const Tensor4& x, const Tensor4& mean, const Tensor4& variance);
  // y = act(z) * gate[n, c], which may be x. sums, if given: (N, C), of act(z) over the pixels.
  Error (*forward)(const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y, const Tensor4& sums,
                   Activation act);
  // (N, C): the sums of dy * act(z) over the pixels.
  Error (*backward_gate)(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& sums,
                         Activation act);
  // With dz = (dy * gate + offset) * act'(z): the sums (2, C) of dz and of dz * (x - mean) over images and pixels.
  Error (*backward_sums)(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& sums,
                         Activation act);
  // dx = scale * dz + slope * (x - mean) + constant, which may be dy. slope and constant are (2, C) in one.
  Error (*backward_input)(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& line,
                          const Tensor4& dx, Activation act);
};

}  // namespace vops
