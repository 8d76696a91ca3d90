// The global filter of small square maps. A plane stays in shared memory between its transforms, whose lines are in
// registers: a thread is one channel, and one of the frequencies of a row.
#include <type_traits>

#include "channels.cuh"
#include "dft.cuh"
#include "global_filter_cuda.h"
#include "grid_model.h"

namespace vops {
namespace {

template <int N>
struct FilterShape {
  static constexpr int kFrequencies = N / 2 + 1, kNumbers = 2 * N * kFrequencies;  // of a channel's weight
  static constexpr int kLanes = N > 16 ? 16 : 32;  // channels of a block; planes of 24 x 24 leave room for so many
  static constexpr int kBlock = kLanes * kFrequencies;
  static constexpr int kPitch = kLanes + 1;  // lanes that copy neighbouring pixels meet no bank twice
  static constexpr int kShared = (N * N + kNumbers) * kPitch * int(sizeof(float));
  // Blocks per SM. Where a thread keeps a column of x, of dy and of dw, registers for fewer.
  static constexpr int kBlocks = N == 7 ? 8 : N == 24 ? 2 : 4, kBackwardBlocks = N == 7 ? 5 : N == 24 ? 1 : 2;
};

template <class F>
__device__ __forceinline__ void with_type(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32:
      return f(float());
    case kBFloat16:
      return f(__nv_bfloat16());
    default:
      return f(__half());
  }
}

// The planes of a block's channels, one image at a time: [row][column][lane]. A transformed row has its real parts at
// their frequencies l, and the imaginary part of l at N - l; those of 0 and of N / 2 are zero, or do not count.
template <int N>
class FilterTile : FilterShape<N> {
  using Shape = FilterShape<N>;
  using Shape::kBlock;
  using Shape::kFrequencies;
  using Shape::kLanes;
  using Shape::kNumbers;
  using Shape::kPitch;

 public:
  __device__ FilterTile(float* shared, int64_t first_channel, int64_t channels)
      : plane_(shared),
        weight_(shared + N * N * kPitch),
        first_channel_(first_channel),
        lanes_(int(min(int64_t(kLanes), channels - first_channel))),
        lane_(int(threadIdx.x) % kLanes),
        worker_(int(threadIdx.x) / kLanes) {}

  // With what the transforms there and back multiply by: N * N, and 2 for splitting pairs of rows.
  __device__ void load_weight(const Tensor4& w, bool conjugated) {
    const float scale = 1.f / (2 * N * N);
    const float* from = static_cast<const float*>(w.data) + first_channel_ * kNumbers;
    for (int i = threadIdx.x; i < lanes_ * kNumbers; i += kBlock)
      weight_[i % kNumbers * kPitch + i / kNumbers] = (i % 2 && conjugated ? -scale : scale) * from[i];
  }

  // x, transformed along its rows, times 2. Two rows are the real and imaginary parts of one.
  __device__ void read_rows(const Tensor4& t, int64_t n) {
    float re[N] = {}, im[N] = {};
    const bool through_tile = t.stride[1] != 1;
    if (!through_tile && has_channel()) load_rows(t, n, re, im);
    __syncthreads();  // nobody needs what the plane was
    if (through_tile) {
      copy_in(t, n);
      __syncthreads();
      load_rows(re, im);
    }
    dft(re, im);
    if (has_rows()) {
      float *first = at(2 * worker_, 0), *second = at(2 * worker_ + 1, 0);
#pragma unroll
      for (int l = 0; l < kFrequencies; l++) {
        const int m = (N - l) % N;
        first[l * kPitch] = re[l] + re[m];
        if (l != m) first[m * kPitch] = im[l] - im[m];
        if (!has_second_row()) continue;
        second[l * kPitch] = im[l] + im[m];
        if (l != m) second[m * kPitch] = re[m] - re[l];
      }
    }
    __syncthreads();
  }

  // The column of the thread's frequency.
  __device__ void load_column(float (&re)[N], float (&im)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i++) {
      re[i] = *at(i, worker_);
      im[i] = is_real() ? 0.f : *at(i, N - worker_);
    }
    dft(re, im);
  }
  __device__ void filter_column(float (&re)[N], float (&im)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) {
      const float* w = &weight_[(k * kFrequencies + worker_) * 2 * kPitch + lane_];
      const float before = re[k], w_re = w[0], w_im = w[kPitch];
      re[k] = before * w_re - im[k] * w_im;
      im[k] = before * w_im + im[k] * w_re;
    }
    dft(im, re);
#pragma unroll
    for (int i = 0; i < N; i++) {
      *at(i, worker_) = re[i];
      if (!is_real()) *at(i, N - worker_) = im[i];
    }
  }

  __device__ void write_rows(const Tensor4& t, int64_t n) {
    __syncthreads();
    float re[N] = {}, im[N] = {};
    if (has_rows()) {
      const float *first = at(2 * worker_, 0), *second = at(2 * worker_ + 1, 0);
#pragma unroll
      for (int l = 0; l < kFrequencies; l++) {
        const int m = (N - l) % N;
        const float a_re = first[l * kPitch], a_im = l == m ? 0.f : first[m * kPitch];
        const float b_re = has_second_row() ? second[l * kPitch] : 0.f;
        const float b_im = has_second_row() && l != m ? second[m * kPitch] : 0.f;
        re[m] = a_re + b_im;
        im[m] = b_re - a_im;
        re[l] = a_re - b_im;
        im[l] = a_im + b_re;
      }
    }
    dft(im, re);
    if (t.stride[1] == 1) {
      if (has_channel()) store_rows(t, n, re, im);
      return;
    }
    store_rows(re, im);
    __syncthreads();
    copy_out(t, n);
  }

  __device__ bool has_channel() const { return lane_ < lanes_; }
  __device__ int64_t channel() const { return first_channel_ + lane_; }
  __device__ int frequency() const { return worker_; }

 private:
  __device__ float* at(int row, int column) const { return plane_ + (row * N + column) * kPitch + lane_; }
  // One worker more than there are pairs of rows; the last row of an odd number has no other.
  __device__ bool has_rows() const { return 2 * worker_ < N; }
  __device__ bool has_second_row() const { return N % 2 == 0 || 2 * worker_ + 1 < N; }
  __device__ bool is_real() const { return worker_ == 0 || 2 * worker_ == N; }
  template <class T>
  __device__ T* address(const Tensor4& t, int64_t n, int64_t c, int row) const {
    return static_cast<T*>(t.data) + n * t.stride[0] + c * t.stride[1] + opaque(row) * t.stride[2];
  }

  __device__ void load_rows(const Tensor4& t, int64_t n, float (&re)[N], float (&im)[N]) const {
    if (!has_rows()) return;
    with_type(t.dtype, [&](auto zero) {
      const auto* p = address<const decltype(zero)>(t, n, channel(), 2 * worker_);
#pragma unroll
      for (int j = 0; j < N; j++, p += t.stride[3]) {
        re[j] = static_cast<float>(*p);
        if (has_second_row()) im[j] = static_cast<float>(p[t.stride[2]]);
      }
    });
  }
  __device__ void store_rows(const Tensor4& t, int64_t n, const float (&re)[N], const float (&im)[N]) const {
    if (!has_rows()) return;
    with_type(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      T* p = address<T>(t, n, channel(), 2 * worker_);
#pragma unroll
      for (int j = 0; j < N; j++, p += t.stride[3]) {
        *p = static_cast<T>(re[j]);
        if (has_second_row()) p[t.stride[2]] = static_cast<T>(im[j]);
      }
    });
  }
  __device__ void load_rows(float (&re)[N], float (&im)[N]) const {
    if (!has_rows()) return;
#pragma unroll
    for (int j = 0; j < N; j++) {
      re[j] = *at(2 * worker_, j);
      if (has_second_row()) im[j] = *at(2 * worker_ + 1, j);
    }
  }
  __device__ void store_rows(const float (&re)[N], const float (&im)[N]) {
    if (!has_rows()) return;
#pragma unroll
    for (int j = 0; j < N; j++) {
      *at(2 * worker_, j) = re[j];
      if (has_second_row()) *at(2 * worker_ + 1, j) = im[j];
    }
  }

  // Calls f(where a pixel is in the tensor, where in the tile): neighbouring threads have neighbouring pixels of a
  // channel.
  template <class F>
  __device__ void for_each_pixel(const Tensor4& t, const F& f) const {
    const auto in_tile = [](int i) { return i % (N * N) * kPitch + i / (N * N); };
    const int count = lanes_ * N * N, first = opaque(int(threadIdx.x));
    if (t.stride[1] == N * N && t.stride[2] == N && t.stride[3] == 1) {
#pragma unroll 8
      for (int i = first; i < count; i += kBlock) f(i, in_tile(i));
    } else {
#pragma unroll 1
      for (int i = first; i < count; i += kBlock) {
        const int row = i % (N * N) / N, column = i % N;
        f(i / (N * N) * t.stride[1] + row * t.stride[2] + column * t.stride[3], in_tile(i));
      }
    }
  }
  __device__ void copy_in(const Tensor4& t, int64_t n) {
    with_type(t.dtype, [&](auto zero) {
      const auto* p = address<const decltype(zero)>(t, n, first_channel_, 0);
      for_each_pixel(t, [&](int64_t from, int to) { plane_[to] = static_cast<float>(p[from]); });
    });
  }
  __device__ void copy_out(const Tensor4& t, int64_t n) {
    with_type(t.dtype, [&](auto zero) {
      using T = decltype(zero);
      T* p = address<T>(t, n, first_channel_, 0);
      for_each_pixel(t, [&](int64_t to, int from) { p[to] = static_cast<T>(plane_[from]); });
    });
  }

  float *plane_, *weight_;
  int64_t first_channel_;
  int lanes_, lane_, worker_;
};

// A block has the channels of one of channel_blocks, in one of the splits of the images.
struct Cut {
  int64_t channel_blocks, images_per_split, splits;
};

template <int N>
Cut cut_images(const Tensor4& t, int resident) {
  Cut c;
  c.channel_blocks = ceil_div(t.size[1], int64_t(FilterShape<N>::kLanes));
  c.images_per_split = max(ceil_div(t.size[0] * c.channel_blocks, kSms * resident), int64_t(1));
  c.splits = ceil_div(t.size[0], c.images_per_split);
  return c;
}

template <int N, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    filter_kernel(Tensor4 x, Tensor4 w, Tensor4 y, bool conjugated, Cut cut) {
  VOPS_DYN_SMEM(float, smem);
  FilterTile<N> tile(smem, blockIdx.x % cut.channel_blocks * FilterShape<N>::kLanes, x.size[1]);
  tile.load_weight(w, conjugated);
  const int64_t begin = blockIdx.x / cut.channel_blocks * cut.images_per_split;
  const int64_t end = min(begin + cut.images_per_split, x.size[0]);
#pragma unroll 1
  for (int64_t n = begin; n < end; n++) {
    float re[N], im[N];
    tile.read_rows(x, n);
    tile.load_column(re, im);
    tile.filter_column(re, im);
    tile.write_rows(y, n);
  }
}

// dw, and dx with it where it is wanted: with X and G the spectra of x and dy, the sums over the images of conj(X) * G
// go to partial[splits][numbers of a weight][channels].
template <int N, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    filter_backward_kernel(Tensor4 dy, Tensor4 x, Tensor4 w, Tensor4 dx, float* partial, Cut cut) {
  VOPS_DYN_SMEM(float, smem);
  const int64_t channels = x.size[1], split = blockIdx.x / cut.channel_blocks;
  FilterTile<N> tile(smem, blockIdx.x % cut.channel_blocks * FilterShape<N>::kLanes, channels);
  tile.load_weight(w, true);
  float dw_re[N] = {}, dw_im[N] = {};
  const int64_t end = min((split + 1) * cut.images_per_split, x.size[0]);
#pragma unroll 1
  for (int64_t n = split * cut.images_per_split; n < end; n++) {
    float x_re[N], x_im[N], re[N], im[N];
    tile.read_rows(x, n);
    tile.load_column(x_re, x_im);
    tile.read_rows(dy, n);
    tile.load_column(re, im);
#pragma unroll
    for (int k = 0; k < N; k++) {
      dw_re[k] += x_re[k] * re[k] + x_im[k] * im[k];
      dw_im[k] += x_re[k] * im[k] - x_im[k] * re[k];
    }
    if (!dx.data) continue;
    tile.filter_column(re, im);
    tile.write_rows(dx, n);
  }
  if (!tile.has_channel()) return;
  // A frequency counts for itself and for the mirror image that is not stored; both spectra are times 2.
  const int l = tile.frequency();
  const float scale = (l == 0 || 2 * l == N ? 1.f : 2.f) / (4 * N * N);
#pragma unroll
  for (int k = 0; k < N; k++) {
    const int64_t number = split * FilterShape<N>::kNumbers + (k * FilterShape<N>::kFrequencies + l) * 2;
    partial[number * channels + tile.channel()] = scale * dw_re[k];
    partial[(number + 1) * channels + tile.channel()] = scale * dw_im[k];
  }
}

__global__ void __launch_bounds__(kThreads, 8)
    add_splits_of_filter_kernel(const float* partial, Tensor4 dw, int64_t splits) {
  const int64_t channels = dw.size[1], numbers = dw.size[2] * dw.size[3], count = channels * numbers;
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x;
  if (i >= count) return;
  float sum = 0;
#pragma unroll 8
  for (int64_t split = 0; split < splits; split++) sum += partial[split * count + i];
  static_cast<float*>(dw.data)[i % channels * numbers + i / channels] = sum;
}

int64_t bytes(const Tensor4& t) {
  return t.data ? t.size[0] * t.size[1] * t.size[2] * t.size[3] * (t.dtype == kFloat32 ? 4 : 2) : 0;
}
// Instructions of arithmetic, as README.md counts them.
template <int N>
int64_t filter_work(const Tensor4& x) {
  return x.size[0] * x.size[1] * N * N * 29;
}

template <int N>
Error launch_filter(const Tensor4& x, const Tensor4& w, const Tensor4& y, bool conjugated, cudaStream_t stream) {
  using Shape = FilterShape<N>;
  constexpr int kBlock = Shape::kBlock, kBlocks = Shape::kBlocks;
  static_assert(kBlocks * (Shape::kShared + 1024) <= kSharedMemoryPerSm, "shared memory holds fewer blocks");
  const Cut c = cut_images<N>(x, kBlocks);
  if (c.channel_blocks * c.splits == 0) return nullptr;
  constexpr auto kernel = &filter_kernel<N, kBlock, kBlocks>;
  if (const Error error = allow_shared_memory(kernel, Shape::kShared)) return error;
  VOPS_COST(bytes(x) + bytes(w), bytes(y), filter_work<N>(x));
  VOPS_LAUNCH(kernel, dim3(unsigned(c.channel_blocks * c.splits)), kBlock, Shape::kShared, stream, x, w, y, conjugated,
              c);
  return error_text(cudaGetLastError());
}

template <int N>
Error launch_filter_backward(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx,
                             const Tensor4& dw, float* partial, cudaStream_t stream) {
  using Shape = FilterShape<N>;
  constexpr int kBlock = Shape::kBlock, kBlocks = Shape::kBackwardBlocks;
  const Cut c = cut_images<N>(x, kBlocks);
  if (c.channel_blocks * c.splits != 0) {
    constexpr auto kernel = &filter_backward_kernel<N, kBlock, kBlocks>;
    if (const Error error = allow_shared_memory(kernel, Shape::kShared)) return error;
    VOPS_COST(bytes(x) + bytes(dy) + bytes(w), bytes(dx) + c.splits * bytes(dw), 2 * filter_work<N>(x));
    VOPS_LAUNCH(kernel, dim3(unsigned(c.channel_blocks * c.splits)), kBlock, Shape::kShared, stream, dy, x, w, dx,
                partial, c);
    if (const Error error = error_text(cudaGetLastError())) return error;
  }
  const int64_t blocks = ceil_div(dw.size[1] * Shape::kNumbers, int64_t(kThreads));
  if (blocks == 0) return nullptr;
  VOPS_COST(c.splits * bytes(dw), bytes(dw), 0);
  VOPS_LAUNCH(add_splits_of_filter_kernel, dim3(unsigned(blocks)), kThreads, 0, stream, partial, dw, c.splits);
  return error_text(cudaGetLastError());
}

// Maps of the last two stages of the published networks, at 224 and at 384 pixels.
template <class F>
auto with_size(int64_t n, const F& f) {
  switch (n) {
    case 7:
      return f(std::integral_constant<int, 7>());
    case 12:
      return f(std::integral_constant<int, 12>());
    case 14:
      return f(std::integral_constant<int, 14>());
    default:
      return f(std::integral_constant<int, 24>());
  }
}

}  // namespace

bool has_filter_kernel(int dtype, int64_t height, int64_t width) {
  return dtype != kFloat64 && height == width && (width == 7 || width == 12 || width == 14 || width == 24);
}

Error global_filter_cuda(const Tensor4& x, const Tensor4& w, const Tensor4& y, CudaTarget target) {
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  return with_size(x.size[3], [&](auto n) { return launch_filter<n()>(x, w, y, false, stream); });
}

Error global_filter_backward_cuda(const Tensor4& dy, const Tensor4& x, const Tensor4& w, const Tensor4& dx,
                                  const Tensor4& dw, void* workspace, CudaTarget target) {
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  float* const partial = static_cast<float*>(workspace);
  return with_size(x.size[3], [&](auto n) {
    // The gradient of the input is the filter with the conjugated weight.
    return dw.data ? launch_filter_backward<n()>(dy, x, w, dx, dw, partial, stream)
                   : launch_filter<n()>(dy, w, dx, true, stream);
  });
}

int64_t global_filter_backward_workspace(const Tensor4& dy) {
  return with_size(dy.size[3], [&](auto n) {
    using Shape = FilterShape<n()>;
    return cut_images<n()>(dy, Shape::kBackwardBlocks).splits * Shape::kNumbers * dy.size[1] * int64_t(sizeof(float));
  });
}

}  // namespace vops
