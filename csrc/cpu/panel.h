// Kernels compute on panels: some rows of one image, in blocks of kLanes channels. A packed panel is contiguous,
// [block][row] [column][lane], in the accumulation type; storage types, layouts, strides and channel slices end at
// pack_rows and unpack_rows. Where the channels of a tensor are whole blocks of neighbours, a panel can also be the
// tensor itself.
#pragma once
#include "dwconv.h"
#include "runtime.h"
#include "types.h"

namespace vops {
namespace VOPS_ISA {

template <class T>
struct Panel {
  T* data;
  int64_t first_row, width;                   // rows before first_row are not there
  int64_t row_step, column_step, block_step;  // in elements
  T* at(int64_t row, int64_t column) const { return data + (row - first_row) * row_step + column * column_step; }
  Panel block(int64_t b) const { return {data + b * block_step, first_row, width, row_step, column_step, block_step}; }
};
template <class T>
VOPS_INLINE Panel<const T> as_const(const Panel<T>& p) {
  return {p.data, p.first_row, p.width, p.row_step, p.column_step, p.block_step};
}
template <class T>
VOPS_INLINE Panel<T> packed_panel(T* data, int64_t first_row, int64_t width, int64_t block_step) {
  return {data, first_row, width, width * kLanes, kLanes, block_step};
}

struct Channels {  // [begin, begin + count) of a tensor
  int64_t begin, count;
  int64_t blocks() const { return (count + kLanes - 1) / kLanes; }
};

// Rows [begin, end) of image n. The blocks of kLanes channels become panels that lie `block_stride` elements apart; the
// last one is filled up with zeros. Several blocks at once serve channels_last tensors, whose cache lines and pages
// they share.
template <class A>
void pack_rows(const Tensor4& t, int64_t n, Channels c, int64_t begin, int64_t end, A* panel, int64_t block_stride);
template <class A>
void unpack_rows(const A* panel, int64_t block_stride, const Tensor4& t, int64_t n, Channels c, int64_t begin,
                 int64_t end);
bool is_channels_last(const Tensor4& t);

// Image n of a channels_last tensor as a panel.
template <class T>
VOPS_INLINE Panel<T> tensor_panel(const Tensor4& t, int64_t n, int64_t channel) {
  return {(T*)t.data + n * t.stride[0] + channel, 0, t.size[3], t.stride[2], t.stride[3], kLanes};
}

// Weights (1, C, 1, K*K) and biases (1, C, 1, 1) as panels; an absent bias is 0.
template <class A>
VOPS_INLINE void pack_weight(const Tensor4& w, Channels c, A* panel, int64_t block_stride) {
  pack_rows(w, 0, c, 0, 1, panel, block_stride);
}
template <class A>
VOPS_INLINE void pack_bias(const Tensor4& b, Channels c, A* panel, int64_t block_stride) {
  if (b.data) return pack_rows(b, 0, c, 0, 1, panel, block_stride);
  for (int64_t i = 0; i < c.blocks(); i++) memset(panel + i * block_stride, 0, kLanes * sizeof(A));
}
template <class A>
VOPS_INLINE void reverse_taps(A* w, int64_t taps) {
  for (int64_t i = 0, j = taps - 1; i < j; i++, j--) {
    const Vec<A> a = load(w + i * kLanes), b = load(w + j * kLanes);
    store(w + i * kLanes, b);
    store(w + j * kLanes, a);
  }
}

// u = act(u), and u = dy * act'(u).
template <class A>
void activate(A* u, int64_t vectors, Activation act);
template <class A>
void activate_backward(A* u, const A* dy, int64_t vectors, Activation act);
// The same in place, for rows of a channels_last tensor of whole blocks.
void activate_tensor(const Tensor4& u, int64_t n, Channels c, int64_t begin, int64_t end, Activation act);
void activate_tensor_backward(const Tensor4& u, const Tensor4& dy, int64_t n, Channels c, int64_t begin, int64_t end,
                              Activation act);

VOPS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
VOPS_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
VOPS_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
VOPS_INLINE int64_t clamp64(int64_t v, int64_t low, int64_t high) { return max64(low, min64(v, high)); }
VOPS_INLINE int64_t blocks_of(int64_t channels) { return ceil_div(channels, kLanes); }
VOPS_INLINE int64_t padded(int64_t channels) { return blocks_of(channels) * kLanes; }
// Channels of `count` blocks from the given one on.
VOPS_INLINE Channels channels_of_blocks(int64_t channels, int64_t block, int64_t count) {
  return {block * kLanes, min64(count * kLanes, channels - block * kLanes)};
}

}  // namespace VOPS_ISA
}  // namespace vops
