// Depthwise convolution of panels. Taps outside the image are skipped, not multiplied by zero: at 14x14 and dilation 3
// more than half of the 7x7 taps are.
#pragma once
#include "panel.h"

namespace vops {
namespace VOPS_ISA {

struct RowRange {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

// Rows of the input, out of `height`, that these rows of the output read; and the other way round for the transposed
// convolution.
VOPS_INLINE RowRange input_rows(RowRange out, int64_t height, const DwConv& f) {
  if (out.size() == 0) return {0, 0};
  return {clamp64(out.begin * f.stride - f.pad_top, 0, height),
          clamp64((out.end - 1) * f.stride - f.pad_top + (f.kernel - 1) * f.dilation + 1, 0, height)};
}
VOPS_INLINE RowRange output_rows(RowRange in, int64_t out_height, const DwConv& f) {
  if (in.size() == 0) return {0, 0};
  const int64_t first = in.begin + f.pad_top - (f.kernel - 1) * f.dilation;
  return {clamp64(first <= 0 ? 0 : ceil_div(first, f.stride), 0, out_height),
          clamp64((in.end - 1 + f.pad_top) / f.stride + 1, 0, out_height)};
}

// The taps [begin, end) whose source index start + k * step lies in [0, size).
VOPS_INLINE RowRange live_taps(int64_t start, int64_t step, int64_t taps, int64_t size) {
  RowRange live = {0, taps};  // divisions are slow, and only the borders need them
  if (start < 0) live.begin = ceil_div(-start, step);
  if (start + (taps - 1) * step >= size) live.end = start >= size ? 0 : (size - 1 - start) / step + 1;
  return live;
}

// The convolutions that are unrolled; all others take plain loops.
VOPS_INLINE bool has_tiles(const DwConv& f) {
  return f.kernel >= 3 && f.kernel <= 9 && f.kernel % 2 == 1 && f.stride <= 2;
}

template <class A>
struct Weights {
  const A *taps, *bias;
  int64_t block_step;
  Weights block(int64_t b) const { return {taps + b * block_step, bias + b * block_step, block_step}; }
};

// y rows [out.begin, out.end) = bias + conv(x); x holds input_rows(out) of an image of `height` rows. T is A, or, for
// kernel 3, a half type.
template <class T, class A>
void conv_rows(const Panel<const T>& x, int64_t height, const Weights<A>& w, int64_t blocks, DwConv f, RowRange out,
               const Panel<T>& y);

// dx rows [in.begin, in.end) = transposed conv(dy); dy holds output_rows(in) of an image of `out_height` rows.
template <class T, class A>
void conv_transposed_rows(const Panel<const T>& dy, int64_t out_height, const Weights<A>& w, int64_t blocks, DwConv f,
                          RowRange in, const Panel<T>& dx);

// sums[b * step] += the gradient of block b's taps and, after them, of its bias, over dy rows [out.begin, out.end); x
// holds input_rows(out). T is A, or, for kernel 3, a half type.
template <class T, class A>
void conv_weight_rows(const Panel<const T>& dy, const Panel<const T>& x, int64_t height, int64_t blocks, DwConv f,
                      RowRange out, A* sums, int64_t step);

// sums[b * step] += the sum of block b over all pixels of the rows.
template <class T, class A>
void sum_rows(const Panel<const T>& x, int64_t blocks, RowRange rows, A* sums, int64_t step);

}  // namespace VOPS_ISA
}  // namespace vops
