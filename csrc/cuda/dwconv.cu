// Chooses the kernel of a pass: march kernels (dwconv_k*.cu) where they apply, else the plain ones.
#include "dwconv_cuda.h"
#include "dwconv_plain.h"

namespace vops {
namespace {

constexpr int64_t kMostDilation = 16;  // every phase is walked, whether it has points or not
constexpr int64_t kMostSplits = 64;    // of a plain weight gradient

// Whether a strip of the tensor can be addressed: neighbouring channels, row steps in 32 bits.
bool march_can_read(const Tensor4& t, const DwConv& f) {
  return (t.stride[1] == 1 || t.size[1] == 1) && f.dilation * t.stride[2] < int64_t(1) << 32 &&
         t.size[2] < kMostPoints && t.size[3] < kMostPoints;
}

bool marches(const Tensor4& a, const Tensor4& b, const DwConv& f) {
  return has_march_kernel(a.dtype, f) && march_can_read(a, f) && march_can_read(b, f);
}

Axis axis(const Tensor4& x, const Tensor4& y, int dim, const DwConv& f) {
  return {int(x.size[dim]), int(y.size[dim]), int(f.dilation), int(f.stride), int(dim == 2 ? f.pad_top : f.pad_left)};
}

struct MarchKernels {
  decltype(&march<3>) conv;
  decltype(&march_wgrad<3>) wgrad;
  decltype(&march_wgrad_splits<3>) wgrad_splits;
};
template <int K>
constexpr MarchKernels kMarchKernels = {march<K>, march_wgrad<K>, march_wgrad_splits<K>};

const MarchKernels& march_kernels(int64_t K) {
  return K == 3 ? kMarchKernels<3> : K == 5 ? kMarchKernels<5> : K == 7 ? kMarchKernels<7> : kMarchKernels<9>;
}

Error run(const PlainConv& p, CudaTarget target) {
  if (elements(p.y) == 0) return nullptr;
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  if (!marches(p.x, p.y, p.conv) || (p.dy.data && !march_can_read(p.dy, p.conv))) return plain_conv(p, stream);

  DwConv f = p.conv;
  March::Kind kind = March::kForward;
  if (p.transposed && f.stride == 1) {
    const int64_t reach = f.dilation * (f.kernel - 1);
    f.pad_top = reach - f.pad_top;
    f.pad_left = reach - f.pad_left;
    kind = March::kReversed;
  } else if (p.transposed) {
    kind = March::kTransposed;
  }
  // At stride 2 the axes are those of the convolution, from the gradient's result to its argument.
  const Tensor4 &from = kind == March::kTransposed ? p.y : p.x, &to = kind == March::kTransposed ? p.x : p.y;
  const March m = {pixels(p.x),
                   pixels(p.y),
                   pixels(p.dy),
                   p.w.data,
                   p.b.data,
                   p.x.dtype,
                   p.w.dtype,
                   p.b.dtype,
                   p.y.size[0],
                   p.y.size[1],
                   axis(from, to, 2, f),
                   axis(from, to, 3, f),
                   p.act,
                   kind};
  return march_kernels(f.kernel).conv(m, stream);
}

MarchWgrad march_wgrad_of(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db, const DwConv& f,
                          double scale, void* partial) {
  return {scale,
          pixels(x),
          pixels(dy),
          dw.data,
          db.data,
          static_cast<float*>(partial),
          dy.dtype,
          dw.dtype,
          db.dtype,
          dy.size[0],
          dy.size[1],
          axis(x, dy, 2, f),
          axis(x, dy, 3, f)};
}

int64_t plain_splits(const Tensor4& dy) {
  const int64_t rows = dy.size[0] * dy.size[2];
  return rows < 1 ? 1 : rows < kMostSplits ? rows : kMostSplits;
}

}  // namespace

bool has_march_kernel(int dtype, const DwConv& f) {
  const bool size = f.kernel >= 3 && f.kernel <= 9;  // and odd, as all are
  const bool stride = f.stride == 1 || (f.stride == 2 && f.kernel == 3 && f.dilation % 2 == 1);
  return dtype != kFloat64 && size && stride && f.dilation <= kMostDilation && f.pad_top < kMostPoints &&
         f.pad_left < kMostPoints;
}

Error dwconv_cuda(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, DwConv conv, Activation act,
                  CudaTarget target) {
  return run({x, w, b, y, {}, conv, act, false}, target);
}
Error dwconv_backward_activation_cuda(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b,
                                      const Tensor4& du, DwConv conv, Activation act, CudaTarget target) {
  return run({x, w, b, du, dy, conv, act, false}, target);
}
Error dwconv_backward_input_cuda(const Tensor4& dy, const Tensor4& w, const Tensor4& dx, DwConv conv,
                                 CudaTarget target) {
  return run({dy, w, {}, dx, {}, conv, kNoActivation, true}, target);
}

Error dwconv_backward_weight_cuda(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db,
                                  DwConv conv, double scale, void* workspace, CudaTarget target) {
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  if (elements(dy) != 0 && marches(x, dy, conv))
    return march_kernels(conv.kernel).wgrad(march_wgrad_of(dy, x, dw, db, conv, scale, workspace), stream);
  return plain_wgrad({x, dy, dw, db, conv, scale, plain_splits(dy), workspace}, stream);
}

// The most that either kernel takes: which one runs depends on strides, too.
int64_t dwconv_backward_weight_workspace(const Tensor4& dy, DwConv conv) {
  int64_t splits = plain_splits(dy);
  if (elements(dy) != 0 && has_march_kernel(dy.dtype, conv) && dy.size[2] < kMostPoints && dy.size[3] < kMostPoints) {
    const int64_t marched = march_kernels(conv.kernel).wgrad_splits(march_wgrad_of(dy, dy, {}, {}, conv, 1, nullptr));
    if (marched > splits) splits = marched;
  }
  return splits * (conv.kernel * conv.kernel + 1) * dy.size[1] * (dy.dtype == kFloat64 ? 8 : 4);
}

}  // namespace vops
