// One thread per output, any strides, kernel size, stride, padding and dilation: what the march kernels do not cover,
// float64 above all. And the second stage of the weight gradients.
#include "activation.cuh"
#include "channels.cuh"
#include "dwconv_plain.h"

namespace vops {
namespace {

// Enough to fill a GPU; threads go on from there.
unsigned blocks_for(int64_t threads) { return unsigned(min(ceil_div(threads, int64_t(kThreads)), int64_t(1) << 16)); }

__device__ int64_t offset(const Tensor4& t, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * t.stride[0] + c * t.stride[1] + h * t.stride[2] + w * t.stride[3];
}

// The input that tap k of output i reads, or -1; against the convolution if `transposed`.
__device__ int64_t source(int64_t i, int64_t k, int64_t size, int64_t stride, int64_t dilation, int64_t pad,
                          bool transposed) {
  int64_t at = transposed ? i + pad - k * dilation : i * stride - pad + k * dilation;
  if (transposed) {
    if (at < 0 || at % stride != 0) return -1;
    at /= stride;
  }
  return at >= 0 && at < size ? at : -1;
}

template <class T, class A>
__global__ void __launch_bounds__(kThreads, 8) plain_kernel(PlainConv p) {
  const int64_t channels = p.y.size[1], height = p.y.size[2], width = p.y.size[3];
  const int64_t count = p.y.size[0] * channels * height * width, kernel = p.conv.kernel;
  const int64_t in_height = p.x.size[2], in_width = p.x.size[3];
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t c = i % channels, column = i / channels % width, row = i / channels / width % height;
    const int64_t n = i / channels / width / height;
    A sum = p.b.data ? load_scalar<A>(p.b.data, p.b.dtype, c * p.b.stride[1]) : A(0);
    for (int64_t k = 0; k < kernel; k++) {
      const int64_t h = source(row, k, in_height, p.conv.stride, p.conv.dilation, p.conv.pad_top, p.transposed);
      if (h < 0) continue;
      for (int64_t l = 0; l < kernel; l++) {
        const int64_t w = source(column, l, in_width, p.conv.stride, p.conv.dilation, p.conv.pad_left, p.transposed);
        if (w < 0) continue;
        const A weight = load_scalar<A>(p.w.data, p.w.dtype, c * p.w.stride[1] + (k * kernel + l) * p.w.stride[3]);
        sum += weight * static_cast<A>(static_cast<const T*>(p.x.data)[offset(p.x, n, c, h, w)]);
      }
    }
    if (p.dy.data) {
      const A dy = static_cast<A>(static_cast<const T*>(p.dy.data)[offset(p.dy, n, c, row, column)]);
      sum = dy * activation_slope(sum, p.act);
    } else {
      sum = activate(sum, p.act);
    }
    static_cast<T*>(p.y.data)[offset(p.y, n, c, row, column)] = static_cast<T>(sum);
  }
}

// Thread (split, tap, channel) adds its share of the rows of dy.
template <class T, class A>
__global__ void __launch_bounds__(kThreads, 8) plain_wgrad_kernel(PlainWgrad p) {
  const int64_t channels = p.dy.size[1], height = p.dy.size[2], width = p.dy.size[3], rows = p.dy.size[0] * height;
  const int64_t taps = p.conv.kernel * p.conv.kernel, count = p.splits * (taps + 1) * channels;
  for (int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x; i < count; i += int64_t(gridDim.x) * kThreads) {
    const int64_t c = i % channels, tap = i / channels % (taps + 1), split = i / channels / (taps + 1);
    const int64_t k = tap / p.conv.kernel, l = tap % p.conv.kernel;
    A sum = 0;
    for (int64_t at = split * rows / p.splits; at < (split + 1) * rows / p.splits; at++) {
      const int64_t n = at / height, row = at % height;
      const int64_t h = source(row, k, p.x.size[2], p.conv.stride, p.conv.dilation, p.conv.pad_top, false);
      if (tap < taps && h < 0) continue;
      A row_sum = 0;  // summed apart: shorter sums, smaller rounding errors
      for (int64_t column = 0; column < width; column++) {
        const A dy = static_cast<A>(static_cast<const T*>(p.dy.data)[offset(p.dy, n, c, row, column)]);
        if (tap == taps) {
          row_sum += dy;
          continue;
        }
        const int64_t w = source(column, l, p.x.size[3], p.conv.stride, p.conv.dilation, p.conv.pad_left, false);
        if (w >= 0) row_sum += dy * static_cast<A>(static_cast<const T*>(p.x.data)[offset(p.x, n, c, h, w)]);
      }
      sum += row_sum;
    }
    static_cast<A*>(p.partial)[i] = sum;
  }
}

constexpr int kParts = kThreads / 32;

// A block adds the splits of one tap and 32 channels: each warp every fourth of them, then the four in order.
template <class A>
__global__ void __launch_bounds__(kThreads, 8) add_splits_kernel(SplitSums<A> s) {
  VOPS_DYN_SMEM(A, parts);  // [kParts][32]
  const int64_t channel_blocks = ceil_div(s.channels, int64_t(32)), tap = blockIdx.x / channel_blocks;
  const int lane = int(threadIdx.x) % 32, part = int(threadIdx.x) / 32;
  const int64_t c = blockIdx.x % channel_blocks * 32 + lane, row = s.channels * (s.taps + 1);
  A sum = 0;
  if (c < s.channels) {
#pragma unroll 8
    for (int64_t split = part; split < s.splits; split += kParts) sum += s.partial[split * row + tap * s.channels + c];
  }
  parts[threadIdx.x] = sum;
  __syncthreads();
  if (part || c >= s.channels) return;
  for (int i = 1; i < kParts; i++) sum += parts[i * 32 + lane];
  sum *= static_cast<A>(s.scale);
  if (tap < s.taps) {
    if (s.dw) store_scalar(s.dw, s.dw_dtype, c * s.taps + tap, sum);
  } else if (s.db) {
    store_scalar(s.db, s.db_dtype, c, sum);
  }
}

template <class T, class A>
Error launch_conv(const PlainConv& p, cudaStream_t stream) {
  const int64_t count = elements(p.y), reads = elements(p.x) + (p.dy.data ? count : 0), size = sizeof(T);
  VOPS_COST(reads * size, count * size, count * p.conv.kernel * p.conv.kernel);
  VOPS_LAUNCH((plain_kernel<T, A>), dim3(blocks_for(count)), kThreads, 0, stream, p);
  return error_text(cudaGetLastError());
}

template <class T, class A>
Error launch_wgrad(const PlainWgrad& p, cudaStream_t stream) {
  const int64_t taps = p.conv.kernel * p.conv.kernel, channels = p.dy.size[1];
  VOPS_COST((elements(p.x) + elements(p.dy)) * int64_t(sizeof(T)),
            p.splits * (taps + 1) * channels * int64_t(sizeof(A)), elements(p.dy) * taps);
  VOPS_LAUNCH((plain_wgrad_kernel<T, A>), dim3(blocks_for(p.splits * (taps + 1) * channels)), kThreads, 0, stream, p);
  if (const Error error = error_text(cudaGetLastError())) return error;
  const A* partial = static_cast<const A*>(p.partial);
  return add_splits<A>({p.scale, partial, p.splits, channels, int(taps), p.dw.dtype, p.db.dtype, p.dw.data, p.db.data},
                       stream);
}

}  // namespace

template <class A>
Error add_splits(const SplitSums<A>& s, cudaStream_t stream) {
  const int64_t blocks = (s.taps + 1) * ceil_div(s.channels, int64_t(32));
  VOPS_COST(s.splits * s.channels * (s.taps + 1) * int64_t(sizeof(A)), s.channels * (s.taps + 1) * int64_t(sizeof(A)),
            0);
  VOPS_LAUNCH((add_splits_kernel<A>), dim3(unsigned(blocks)), kThreads, kThreads * int(sizeof(A)), stream, s);
  return error_text(cudaGetLastError());
}
template Error add_splits(const SplitSums<float>&, cudaStream_t);
template Error add_splits(const SplitSums<double>&, cudaStream_t);

Error plain_conv(const PlainConv& p, cudaStream_t stream) {
  switch (p.y.dtype) {
    case kFloat32:
      return launch_conv<float, float>(p, stream);
    case kBFloat16:
      return launch_conv<__nv_bfloat16, float>(p, stream);
    case kFloat16:
      return launch_conv<__half, float>(p, stream);
    default:
      return launch_conv<double, double>(p, stream);
  }
}

Error plain_wgrad(const PlainWgrad& p, cudaStream_t stream) {
  switch (p.dy.dtype) {
    case kFloat32:
      return launch_wgrad<float, float>(p, stream);
    case kBFloat16:
      return launch_wgrad<__nv_bfloat16, float>(p, stream);
    case kFloat16:
      return launch_wgrad<__half, float>(p, stream);
    default:
      return launch_wgrad<double, double>(p, stream);
  }
}

}  // namespace vops
