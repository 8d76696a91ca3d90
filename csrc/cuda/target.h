// Where a host function of the CUDA kernels runs them.
#pragma once

namespace vops {

struct CudaTarget {
  int device;
  void* stream;
};

}  // namespace vops
