// Batch norm with an activation behind it, in passes: z = scale[c] * x + shift[c], y = act(z). What is between two
// passes, a few numbers per channel, is in a table.
#pragma once
#include "dwconv.h"

namespace vops {

// Contiguous, in the type of the sums: float, or double for double. table: (5, C), the scale, the shift, the mean, the
// inverse deviation and the unbiased variance. gate and offset are (N, C) and may be absent, which is 1 and 0.
struct BatchNormCoefficients {
  Tensor4 table, gate, offset;
};

// What becomes of the sums (2, C) of dz and of dz * (x - mean), over so many pixels: the gradients of weight and bias,
// in any dtype, and (2, C) slope and constant of the part of dx that comes by way of a batch's statistics. Each may be
// absent.
struct BatchNormEnds {
  Tensor4 line, dweight, dbias;
  int64_t count;
};

// Tensors have their channels, or the pixels of their planes, side by side, all the same. Bitwise repeatable, whatever
// the threads. With dz = (dy * gate + offset) * act'(z), gate and offset where they are named:
struct BatchNormActOps {
  // The table, by the mean and the biased variance of x, those of some pixels at a time, merged; without x by those
  // that are given.
  Error (*prepare)(const Tensor4& x, const Tensor4& weight, const Tensor4& bias, const Tensor4& mean,
                   const Tensor4& variance, const Tensor4& table, double eps);
  // y = act(z), which may be x. means, if given: (N, C), of act(z) over the pixels.
  Error (*forward)(const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y, const Tensor4& means,
                   Activation act);
  // y = act(z), if there is a y; and the sums go to their ends.
  Error (*backward_sums)(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y,
                         const BatchNormEnds& ends, Activation act);
  // As long as no offset is known: sums, (N, 5, C), are those of an image's dy * act(z), and of dy and 1 times act'(z),
  // then times act'(z) * (x - mean). y = act(z) * gate, if there is a y.
  Error (*backward_images)(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& y,
                           const Tensor4& sums, Activation act);
  // The ends of such sums, with gates and offsets; of (2, C) without.
  Error (*finish)(const Tensor4& sums, const BatchNormCoefficients& c, const BatchNormEnds& ends);
  // dx = scale * dz + slope * (x - mean) + constant + plus, which may be dy or plus, with gates and offsets; without
  // dy, line or plus without their terms.
  Error (*backward_input)(const Tensor4& dy, const Tensor4& x, const BatchNormCoefficients& c, const Tensor4& line,
                          const Tensor4& plus, const Tensor4& dx, Activation act);
};

}  // namespace vops
