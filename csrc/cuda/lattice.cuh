// A dilated convolution is dilation^2 undilated ones on sub-lattices: the outputs i = i' * dilation + phase of an axis
// read the inputs i * stride - pad + k * dilation = (i' * stride + k + shift) * dilation + input phase. So one kernel
// serves every dilation, at the price of a larger stride in memory.
#pragma once
#include "toolchain.h"

namespace vops {

constexpr int64_t kMostPoints = 1 << 24;  // of an axis: the march kernels compute with them in 32 bits

// One axis of a convolution from `in` points to `out` points; odd dilation at stride 2.
struct Axis {
  int in, out, dilation, stride, pad;
};

struct Phase {
  int in0, out0;  // first points of the sub-lattices
  int in, out;    // how many points they have
  int shift;      // of the input against the output
};

__device__ __forceinline__ int points(int size, int first, int step) { return (size - first + step - 1) / step; }

__device__ __forceinline__ Phase phase_of(const Axis& axis, int phase) {
  const int first = phase * axis.stride - axis.pad, shift = floor_div(first, axis.dilation);
  const int in0 = first - shift * axis.dilation;
  return {in0, phase, points(axis.in, in0, axis.dilation), points(axis.out, phase, axis.dilation), shift};
}

// Against the convolution, for the gradient of a strided input: the axis is still that of the convolution, from which
// the gradient runs from out to in. Point u - shift of the result lies under tap l of point t for u = stride * t + l.
__device__ __forceinline__ Phase reversed_phase_of(const Axis& axis, int phase) {
  const Phase p = phase_of(axis, phase);
  return {p.out0, p.in0, p.out, p.in, p.shift};
}

// How the rows of all images are cut into strips. Strips of one image and row phase follow each other.
struct Strips {
  int64_t count, per_image;
  int per_phase;
};
inline Strips cut_rows(int64_t images, int rows_per_phase, int dilation, int rows) {
  const int per_phase = ceil_div(rows_per_phase, rows);
  return {images * dilation * per_phase, int64_t(dilation) * per_phase, per_phase};
}

struct StripPlace {
  int64_t image;
  int phase, index;
  bool exists;
};
__device__ __forceinline__ StripPlace place_of(const Strips& s, int64_t strip) {
  const bool exists = strip < s.count;
  if (!exists) strip = s.count - 1;
  const int in_image = int(strip % s.per_image);
  return {strip / s.per_image, in_image / s.per_phase, in_image % s.per_phase, exists};
}

// Bit i: point first + i is one of [0, count).
template <int POINTS>
__device__ __forceinline__ uint32_t existing(int first, int count, bool any) {
  uint32_t mask = 0;
#pragma unroll
  for (int i = 0; i < POINTS; i++) mask |= uint32_t(any && first + i >= 0 && first + i < count) << i;
  return mask;
}

// Threads side by side along the channels: the widest choice of those that leave the fewest idle, and no narrower than
// the 32 bytes that memory moves at a time, unless all channels are.
inline int lane_bits_for(int64_t channels, int per_thread, int size) {
  const auto covered = [=](int bits) { return ceil_div(channels, int64_t(per_thread) << bits) << bits; };
  int best = 5;
  for (int bits = 4; bits >= 2; bits--) {
    const int own = per_thread << bits;
    if (covered(bits) < covered(best) && (own * size >= 32 || own >= channels)) best = bits;
  }
  return best;
}

// The widest copy that addresses allow, as far as a strip has as many lanes.
inline int piece_bytes(const void* data, int64_t stride0, int64_t stride1, int64_t stride2, int64_t channels, int size,
                       int most) {
  const int64_t all = int64_t(reinterpret_cast<uintptr_t>(data)) | (stride0 | stride1 | stride2 | channels) * size;
  int piece = most < 16 ? most : 16;
  while (piece > size && all % piece != 0) piece /= 2;
  return piece;
}

}  // namespace vops
