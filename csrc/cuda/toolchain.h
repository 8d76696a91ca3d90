// The one place where device code meets its toolchain: nvcc, or the emulation of csrc/emu.
#pragma once
#ifdef VOPS_EMU
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define VOPS_DYN_SMEM(T, name)                                \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
// Of the launch that follows; recorded in the emulation, here nothing.
#define VOPS_COST(bytes_read, bytes_written, multiply_adds) \
  (void)(bytes_read), (void)(bytes_written), (void)(multiply_adds)
#define VOPS_LAUNCH(kernel, grid, block, smem, stream, ...) (kernel)<<<grid, block, smem, stream>>>(__VA_ARGS__)
#endif
#include "tensor.h"

namespace vops {

constexpr int kThreads = 128;  // per block, of every kernel

// What a call returned. The runtime keeps a failure, too, until somebody asks: the next launch would report it again.
inline Error error_text(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// torch keeps its current device in the CUDA context: it is left as it was found.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    const cudaError_t found = cudaGetDevice(&before_);
    moved_ = found == cudaSuccess && before_ != device;
    error = error_text(moved_ ? cudaSetDevice(device) : found);
  }
  ~DeviceGuard() {
    if (moved_) error_text(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  Error error;

 private:
  int before_ = 0;
  bool moved_ = false;
};

// More than 48 KB of shared memory has to be asked for, on every device; this is no operation of the stream.
template <class Kernel>
Error allow_shared_memory(Kernel* kernel, int bytes) {
  if (bytes <= 48 << 10) return nullptr;
  return error_text(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}
constexpr int kSharedMemoryPerSm = 227 << 10;  // of sm_90 and sm_100; on sm_80 (163 KB) fewer blocks may be resident

inline int64_t elements(const Tensor4& t) { return t.size[0] * t.size[1] * t.size[2] * t.size[3]; }

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}
// For b > 0 and a of either sign.
__host__ __device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

}  // namespace vops
