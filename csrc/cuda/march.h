// What the dispatcher (dwconv.cu) hands to the march kernels of one kernel size (dwconv_k*.cu).
#pragma once
#include "column_ring.cuh"
#include "dwconv.h"
#include "lattice.cuh"

namespace vops {

struct March {
  Pixels x, y, dy;  // in, out; dy present: y = dy * act'(.), else y = act(.)
  const void *w, *b;
  int dtype, w_dtype, b_dtype;
  int64_t images, channels;
  Axis rows, columns;
  Activation act;
  // Forward; its transpose at stride 1, which is the convolution with the taps reversed; its transpose at stride 2.
  enum Kind { kForward, kReversed, kTransposed } kind;
};

struct MarchWgrad {
  double scale;  // of the gradients
  Pixels x, dy;
  void *dw, *db;
  float* partial;  // [splits][taps + 1][channels]
  int dtype, dw_dtype, db_dtype;
  int64_t images, channels;
  Axis rows, columns;
};

template <int K>
Error march(const March& m, cudaStream_t stream);
template <int K>
Error march_wgrad(const MarchWgrad& m, cudaStream_t stream);
template <int K>
int64_t march_wgrad_splits(const MarchWgrad& m);

// dw[c, tap] and db[c]: scale times the sum of partial[split][tap][c] over the splits, in order; row `taps` is the
// bias.
template <class A>
struct SplitSums {
  double scale;
  const A* partial;
  int64_t splits, channels;
  int taps, dw_dtype, db_dtype;
  void *dw, *db;
};
template <class A>
Error add_splits(const SplitSums<A>& s, cudaStream_t stream);

}  // namespace vops
