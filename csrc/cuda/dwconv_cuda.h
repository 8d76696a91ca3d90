// The depthwise engine on CUDA. Semantics and views are those of csrc/include/dwconv.h; any strides are right, and fast
// are tensors whose channels are neighbours, for the convolutions that has_march_kernel() names.
#pragma once
#include "dwconv.h"
#include "multi_order_dwconv.h"
#include "target.h"

namespace vops {

bool has_march_kernel(int dtype, const DwConv& conv);

Error dwconv_cuda(const Tensor4& x, const Tensor4& w, const Tensor4& b, const Tensor4& y, DwConv conv, Activation act,
                  CudaTarget target);
Error dwconv_backward_activation_cuda(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& b,
                                      const Tensor4& du, DwConv conv, Activation act, CudaTarget target);
Error dwconv_backward_input_cuda(const Tensor4& dy, const Tensor4& w, const Tensor4& dx, DwConv conv,
                                 CudaTarget target);
// The gradients times scale. Bitwise repeatable: how the sum is cut depends on shapes, dtypes and the convolution only.
Error dwconv_backward_weight_cuda(const Tensor4& dy, const Tensor4& x, const Tensor4& dw, const Tensor4& db,
                                  DwConv conv, double scale, void* workspace, CudaTarget target);
int64_t dwconv_backward_weight_workspace(const Tensor4& dy, DwConv conv);  // in bytes

// x0, dx0: room for the channels of the second and third branch, channels_last; dx0 and workspace in backward only.
Error multi_order_dwconv_cuda(const Tensor4& x, const MultiOrderDwConv& p, const Tensor4& y, const Tensor4& x0,
                              CudaTarget target);
Error multi_order_dwconv_backward_cuda(const Tensor4& dy, const Tensor4& x, const MultiOrderDwConv& p,
                                       const MultiOrderDwConvGrads& grads, const Tensor4& x0, const Tensor4& dx0,
                                       void* workspace, CudaTarget target);
int64_t multi_order_dwconv_backward_workspace(const Tensor4& dy, const MultiOrderDwConv& p);

}  // namespace vops
