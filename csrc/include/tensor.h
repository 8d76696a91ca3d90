// What the bindings hand to the kernels: plain data, the same for the CPU and for CUDA. No torch, no Python.
#pragma once
#include <cstdint>

namespace vops {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// A strided (N, C, H, W) view; strides count elements and may be anything, 0 included. data is null for an absent
// tensor.
struct Tensor4 {
  void* data;
  int dtype;
  int64_t size[4];
  int64_t stride[4];
};

// Every entry point returns null, or a static string that says what went wrong.
using Error = const char*;

}  // namespace vops
