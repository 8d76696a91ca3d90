// The global filter on CUDA. Views are those of csrc/include/global_filter.h; w and dw are contiguous float32. Any
// strides of the images are right, and fast are both memory formats.
#pragma once
#include "global_filter.h"
#include "target.h"

namespace vops {

// Of the sizes and dtypes that have one; others have no kernel here.
bool has_filter_kernel(int dtype, int64_t height, int64_t width);

Error global_filter_cuda(const Tensor4& x, const Tensor4& w, const Tensor4& y, CudaTarget target);
// dx or dw may be absent. Bitwise repeatable: how the sum over the images is cut depends on the shape only.
Error global_filter_backward_cuda(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx,
                                  const Tensor4& dw, void* workspace, CudaTarget target);
int64_t global_filter_backward_workspace(const Tensor4& dy);  // in bytes, for dw

}  // namespace vops
