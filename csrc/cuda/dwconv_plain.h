// What the dispatcher (dwconv.cu) hands to the plain kernels.
#pragma once
#include "march.h"

namespace vops {

struct PlainConv {
  Tensor4 x, w, b, y, dy;  // dy present: y = dy * act'(.), else y = act(.)
  DwConv conv;
  Activation act;
  bool transposed;
};
struct PlainWgrad {
  Tensor4 x, dy, dw, db;
  DwConv conv;
  double scale;  // of the gradients
  int64_t splits;
  void* partial;  // [splits][taps + 1][channels], float, or double for float64
};

Error plain_conv(const PlainConv& p, cudaStream_t stream);
Error plain_wgrad(const PlainWgrad& p, cudaStream_t stream);

}  // namespace vops
