// Passes of the depthwise engine on slices of channels: the first branch goes straight into its part of the result, the
// others through x0. Nothing is concatenated.
#include "dwconv_cuda.h"
#include "toolchain.h"

namespace vops {
namespace {

Tensor4 slice(Tensor4 t, int64_t begin, int64_t channels) {
  const int64_t bytes = t.dtype == kFloat64 ? 8 : t.dtype == kFloat32 ? 4 : 2;
  if (t.data) t.data = static_cast<char*>(t.data) + begin * t.stride[1] * bytes;
  t.size[1] = channels;
  return t;
}

struct Widths {
  int64_t all, second, third, first;
  explicit Widths(const MultiOrderDwConv& p)
      : all(p.weight[0].size[1]),
        second(p.weight[1].size[1]),
        third(p.weight[2].size[1]),
        first(all - second - third) {}
  int64_t rest() const { return second + third; }
};

Error compute_x0(const Tensor4& x, const MultiOrderDwConv& p, const Tensor4& x0, CudaTarget target) {
  const Widths c(p);
  return dwconv_cuda(slice(x, c.first, c.rest()), slice(p.weight[0], c.first, c.rest()),
                     slice(p.bias[0], c.first, c.rest()), x0, p.conv[0], kNoActivation, target);
}

}  // namespace

Error multi_order_dwconv_cuda(const Tensor4& x, const MultiOrderDwConv& p, const Tensor4& y, const Tensor4& x0,
                              CudaTarget target) {
  const Widths c(p);
  if (const Error error = compute_x0(x, p, x0, target)) return error;
  // The heaviest branch first.
  if (const Error error = dwconv_cuda(slice(x0, c.second, c.third), p.weight[2], p.bias[2],
                                      slice(y, c.first + c.second, c.third), p.conv[2], kNoActivation, target))
    return error;
  if (const Error error = dwconv_cuda(slice(x0, 0, c.second), p.weight[1], p.bias[1], slice(y, c.first, c.second),
                                      p.conv[1], kNoActivation, target))
    return error;
  return dwconv_cuda(slice(x, 0, c.first), slice(p.weight[0], 0, c.first), slice(p.bias[0], 0, c.first),
                     slice(y, 0, c.first), p.conv[0], kNoActivation, target);
}

Error multi_order_dwconv_backward_cuda(const Tensor4& dy, const Tensor4& x, const MultiOrderDwConv& p,
                                       const MultiOrderDwConvGrads& grads, const Tensor4& x0, const Tensor4& dx0,
                                       void* workspace, CudaTarget target) {
  const Widths c(p);
  const bool wants_weight[3] = {grads.weight[0].data || grads.bias[0].data, grads.weight[1].data || grads.bias[1].data,
                                grads.weight[2].data || grads.bias[2].data};
  if (grads.weight[1].data || grads.weight[2].data) {
    if (const Error error = compute_x0(x, p, x0, target)) return error;
  }
  const int64_t begin[3] = {0, 0, c.second}, width[3] = {c.first, c.second, c.third};  // begin: in x0
  for (int i = 2; i >= 1; i--) {
    const Tensor4 branch = slice(dy, c.first + begin[i], width[i]);
    if (grads.dx.data || wants_weight[0]) {
      const Tensor4 into = slice(dx0, begin[i], width[i]);
      if (const Error error = dwconv_backward_input_cuda(branch, p.weight[i], into, p.conv[i], target)) return error;
    }
    if (wants_weight[i]) {
      const Tensor4 from = slice(x0, begin[i], width[i]);
      if (const Error error = dwconv_backward_weight_cuda(branch, from, grads.weight[i], grads.bias[i], p.conv[i], 1,
                                                          workspace, target))
        return error;
    }
  }
  // x0's gradient: in the first branch dy itself.
  const Tensor4 parts[2] = {dx0, slice(dy, 0, c.first)};
  const int64_t part_begin[2] = {c.first, 0}, part_width[2] = {c.rest(), c.first};
  for (int i = 0; i < 2; i++) {
    const auto own = [&](const Tensor4& t) { return slice(t, part_begin[i], part_width[i]); };
    if (part_width[i] == 0) continue;
    if (grads.dx.data) {
      if (const Error error = dwconv_backward_input_cuda(parts[i], own(p.weight[0]), own(grads.dx), p.conv[0], target))
        return error;
    }
    if (wants_weight[0]) {
      if (const Error error = dwconv_backward_weight_cuda(parts[i], own(x), own(grads.weight[0]), own(grads.bias[0]),
                                                          p.conv[0], 1, workspace, target))
        return error;
    }
  }
  return nullptr;
}

int64_t multi_order_dwconv_backward_workspace(const Tensor4& dy, const MultiOrderDwConv& p) {
  const Widths c(p);
  const auto of = [&](int64_t channels, int i) {
    return dwconv_backward_weight_workspace(slice(dy, 0, channels), p.conv[i]);
  };
  int64_t most = of(c.rest(), 0);
  for (const int64_t bytes : {of(c.first, 0), of(c.second, 1), of(c.third, 2)}) most = bytes > most ? bytes : most;
  return most;
}

}  // namespace vops
