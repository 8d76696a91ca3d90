// The channel aggregation's convolution with what follows it at every pixel: GELU and the score forward, GELU's slope
// and the gradients that meet there backward. The hidden tensor is read once and written once, and so is its gradient.
#include "activation.cuh"
#include "channel_aggregation_ffn.cuh"

namespace vops {
namespace {

struct Aggregation {
  Pixels f, h, dh;
  const void *w, *b, *decompose;
  int w_dtype, b_dtype, decompose_dtype;
  const float* dscores;
  float* parts;  // forward: of the scores, [channel block][pixel]; backward: of the sums
  int64_t pixels;
  int f_piece, dh_piece;
  bool whole_words;  // of h, and of dh
};

// Forward the lanes of a strip add up what their channels give to the score of every row: each step of the reduction
// leaves half of the rows to a lane, until it has one.
__device__ __forceinline__ float score_of_row(const float (&dot)[kStripRows], int lane, int lanes) {
  static_assert(kStripRows == 4, "two steps leave one row");
  const bool odd = lane & 1, second = lane & 2;
  float two[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const float other = __shfl_xor_sync(~0u, odd ? dot[2 * i] : dot[2 * i + 1], 1);
    two[i] = (odd ? dot[2 * i + 1] : dot[2 * i]) + other;
  }
  float one = (second ? two[1] : two[0]) + __shfl_xor_sync(~0u, second ? two[0] : two[1], 2);
  for (int step = 4; step < lanes; step *= 2) one += __shfl_xor_sync(~0u, one, step);
  return one;  // of row lane % 4
}

template <class T, bool BACKWARD, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS) march_aggregation_kernel(Aggregation a, Walk g) {
  constexpr int V = kWordChannels<T>, R = kStripRows;
  using Input = Columns<T, kHaloRows>;
  VOPS_DYN_SMEM(float, smem);  // the block's weights; then the rings; backward the sums after them
  T* rings = reinterpret_cast<T*>(smem);
  const Lane l = lane_of<V>(g);
  float w[9][V], bias[V], decompose[V];
  load_taps<V>(a.w, a.w_dtype, l, smem, w);
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int64_t c = l.channel + (l.has<V>(v) ? l.lane * V + v : 0);
    bias[v] = a.b ? load_scalar<float>(a.b, a.b_dtype, c) : 0.f;
    decompose[v] = load_scalar<float>(a.decompose, a.decompose_dtype, c);
  }
  [[maybe_unused]] float sums[2][V] = {};  // of dscores * h, and of dscores

#pragma unroll 1
  for (int64_t unit = blockIdx.x / g.channel_blocks; unit < g.units; unit += g.splits) {
    const Unit u = unit_of(g, l, unit);
    const Input f = columns_of<T, kHaloRows>(rings, a.f, a.f_piece, g, l, u, u.row - 1, u.begin - 1, u.end + 1);
    [[maybe_unused]] const Columns<T, R> dh =
        columns_of<T, R>(rings + Input::kElements, a.dh, a.dh_piece, g, l, u, u.row, u.begin, u.end);
    const uint32_t rows = existing<R>(u.row, g.height, u.exists), stored = l.has<V>(0) ? rows : 0;
    T* h = own_row<T>(a.h, l, u) + u.begin * a.h.column;
    [[maybe_unused]] T* du = BACKWARD ? own_row<T>(a.dh, l, u) + u.begin * a.dh.column : nullptr;
    int64_t pixel = (u.image * g.height + u.row) * g.width + u.begin;  // of row 0

    float sum[3][R][V];
#pragma unroll
    for (int j = 0; j < 3; j++)
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int v = 0; v < V; v++) sum[j][r][v] = bias[v];

    const int first = max(u.begin - 1, 0);
#pragma unroll 1
    for (int chunk = first - Input::kChunk; chunk <= u.end; chunk += Input::kChunk) {  // the first one only fetches
      copy_wait();
      __syncwarp();  // the chunk is there, and all have left the one before, which the next one replaces
      f.fetch(chunk + Input::kChunk);
      if constexpr (BACKWARD) dh.fetch(chunk + Input::kChunk - 1);
      copy_commit();
      const int end = min(chunk + Input::kChunk, u.end + 1);
#pragma unroll 1
      for (int q = max(chunk, first); q < end; q++) {
        // Column q of f ends the sums of column q - 1. Behind the image it is zero.
        const uint32_t wanted = q > u.begin ? stored : 0;
        [[maybe_unused]] float dscore[R];
        if constexpr (BACKWARD) {
#pragma unroll
          for (int r = 0; r < R; r++) dscore[r] = wanted & 1u << r ? a.dscores[pixel + int64_t(r) * g.width] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < kHaloRows; i++) {
          const Channels<T, V> raw = f.at(i, q);
#pragma unroll
          for (int r = 0; r < R; r++) {
            const int k = i - r;
            if (k < 0 || k >= 3) continue;
#pragma unroll
            for (int j = 0; j < 3; j++)
#pragma unroll
              for (int v = 0; v < V; v++) {
                const float before = k > 0 ? sum[j][r][v] : j < 2 ? sum[j < 2 ? j + 1 : j][r][v] : bias[v];
                sum[j][r][v] = fmaf(w[k * 3 + 2 - j][v], channel<T, V>(raw, v), before);
              }
          }
        }
        if (q <= u.begin) continue;
        float (&out)[R][V] = sum[0];  // may be overwritten: the next step reads the others
        if constexpr (BACKWARD) {
          float gradients[R][V];
#pragma unroll
          for (int r = 0; r < R; r++) {
            const Channels<T, V> raw = dh.at(r, q - 1);
#pragma unroll
            for (int v = 0; v < V; v++) {
              float slope;
              out[r][v] = gelu_and_slope(out[r][v], &slope);
              gradients[r][v] = (channel<T, V>(raw, v) + decompose[v] * dscore[r]) * slope;
              sums[0][v] += dscore[r] * (wanted & 1u << r ? out[r][v] : 0.f);
              sums[1][v] += dscore[r];
            }
          }
          store_column<T, V>(wanted, du, uint32_t(a.dh.row), l, a.whole_words, gradients);
          du += a.dh.column;
        } else {
          float dot[R] = {};
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int v = 0; v < V; v++) {
              out[r][v] = activate(out[r][v], kGelu);
              if (l.has<V>(v)) dot[r] += decompose[v] * out[r][v];
            }
          const float score = score_of_row(dot, l.lane, l.lanes);
          if (l.lane < R && (rows & 1u << l.lane)) {
            a.parts[blockIdx.x % g.channel_blocks * a.pixels + pixel + int64_t(l.lane) * g.width] = score;
          }
        }
        store_column<T, V>(wanted, h, uint32_t(a.h.row), l, a.whole_words, out);
        h += a.h.column;
        pixel++;
      }
    }
    copy_wait();
  }
  if constexpr (BACKWARD) {
    add_strips(sums, l, smem);
    const SumsOfShare row(g.channels);
    float* own = a.parts + l.split * row.count;
    for (int c = threadIdx.x; c < l.channels; c += kThreads) own[row.decompose + l.channel + c] = smem[c];
    if (threadIdx.x == 0 && l.channel == 0) own[row.decompose_bias] = smem[l.lanes * V];
  }
}

struct Scores {
  const float* parts;  // [channel block][pixel]
  int64_t pixels;
  int channel_blocks, bias_dtype;
  const void* bias;
  float* scores;
  Tensor4 d;
};

// A thread has one channel of d at a pixel.
template <class T>
__global__ void __launch_bounds__(kThreads, 8) scores_kernel(Scores s) {
  const int64_t i = blockIdx.x * int64_t(kThreads) + threadIdx.x, pixel = i / s.d.size[1], k = i % s.d.size[1];
  if (pixel >= s.pixels) return;
  float score = s.bias ? load_scalar<float>(s.bias, s.bias_dtype, 0) : 0.f;
  for (int block = 0; block < s.channel_blocks; block++) score += s.parts[block * s.pixels + pixel];
  if (k == 0) s.scores[pixel] = score;
  const float d = activate(score, kGelu);
  const T rounded = static_cast<T>(d);
  const T own = k == 0 ? rounded : static_cast<T>(k == 1 ? d - static_cast<float>(rounded) : 0.f);
  const int64_t column = pixel % s.d.size[3], row = pixel / s.d.size[3] % s.d.size[2];
  const int64_t image = pixel / s.d.size[3] / s.d.size[2];
  static_cast<T*>(s.d.data)[image * s.d.stride[0] + row * s.d.stride[2] + column * s.d.stride[3] + k] = own;
}

template <class T, bool BACKWARD>
Error launch(const Tensor4& f, const ChannelAggregation& p, const Tensor4& h, const Tensor4& dh, const float* dscores,
             float* parts, cudaStream_t stream) {
  const Walk g = walk_of(f);
  constexpr int kRings = (Columns<T, kHaloRows>::kElements + BACKWARD * Columns<T, kStripRows>::kElements) * sizeof(T);
  static_assert(kResident * (kRings + 1024) <= kSharedMemoryPerSm, "shared memory holds fewer blocks than declared");
  const int64_t pixels_of_f = f.size[0] * f.size[2] * f.size[3], numbers = pixels_of_f * f.size[1];
  const Aggregation a = {pixels(f),
                         pixels(h),
                         pixels(dh),
                         p.w.data,
                         p.b.data,
                         p.decompose.data,
                         p.w.dtype,
                         p.b.dtype,
                         p.decompose.dtype,
                         dscores,
                         parts,
                         pixels_of_f,
                         piece_of<T>(f, g),
                         BACKWARD ? piece_of<T>(dh, g) : 0,
                         whole_words<T>(h) && (!BACKWARD || whole_words<T>(dh))};
  const int64_t sums = BACKWARD ? g.splits * (f.size[1] + 1) : g.channel_blocks * pixels_of_f;
  VOPS_COST(numbers * int64_t(sizeof(T)) * (BACKWARD ? 2 : 1) + f.size[1] * 11 * 4 + (BACKWARD ? pixels_of_f * 4 : 0),
            numbers * int64_t(sizeof(T)) * (BACKWARD ? 2 : 1) + sums * 4, numbers * 9);
  VOPS_LAUNCH((march_aggregation_kernel<T, BACKWARD, kResident>), dim3(unsigned(g.splits * g.channel_blocks)), kThreads,
              kRings, stream, a, g);
  return error_text(cudaGetLastError());
}

template <class T>
Error forward(const Tensor4& f, const ChannelAggregation& p, const Tensor4& h, const Tensor4& d, float* scores,
              float* parts, cudaStream_t stream) {
  if (const Error error = launch<T, false>(f, p, h, {}, nullptr, parts, stream)) return error;
  const int64_t count = f.size[0] * f.size[2] * f.size[3], blocks = ceil_div(count * d.size[1], int64_t(kThreads));
  const int channel_blocks = walk_of(f).channel_blocks;
  if (blocks > INT32_MAX) return "there are more than 2**31 blocks of scores";
  VOPS_COST(count * channel_blocks * 4, count * (4 + d.size[1] * int64_t(sizeof(T))), 0);
  VOPS_LAUNCH((scores_kernel<T>), dim3(unsigned(blocks)), kThreads, 0, stream,
              Scores{parts, count, channel_blocks, p.decompose_bias.dtype, p.decompose_bias.data, scores, d});
  return error_text(cudaGetLastError());
}

}  // namespace

bool has_aggregation_kernel(const Tensor4& f, int64_t kernel) {
  // Row steps are 32 bits, and those of h, with d behind it, are a little longer.
  const bool addressed = f.stride[1] == 1 && f.stride[2] < int64_t(1) << 31;
  return f.dtype != kFloat64 && kernel == 3 && addressed && f.size[2] < kMostPoints && f.size[3] < kMostPoints;
}

Error channel_aggregation_cuda(const Tensor4& f, const ChannelAggregation& p, const Tensor4& h, const Tensor4& d,
                               const Tensor4& scores, void* workspace, CudaTarget target) {
  if (elements(f) == 0) return nullptr;
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  const auto of = static_cast<float*>(scores.data), parts = static_cast<float*>(workspace);
  switch (f.dtype) {
    case kFloat32:
      return forward<float>(f, p, h, d, of, parts, stream);
    case kBFloat16:
      return forward<__nv_bfloat16>(f, p, h, d, of, parts, stream);
    default:
      return forward<__half>(f, p, h, d, of, parts, stream);
  }
}

int64_t channel_aggregation_workspace(const Tensor4& f) {
  return elements(f) == 0 ? 0 : walk_of(f).channel_blocks * f.size[0] * f.size[2] * f.size[3] * 4;
}

Error channel_aggregation_backward_cuda(const Tensor4& f, const ChannelAggregation& p, const Tensor4& dscores,
                                        const Tensor4& h, const Tensor4& dh, void* workspace, CudaTarget target) {
  if (elements(f) == 0) return nullptr;
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  const auto of = static_cast<const float*>(dscores.data);
  const auto sums = static_cast<float*>(workspace);
  switch (f.dtype) {
    case kFloat32:
      return launch<float, true>(f, p, h, dh, of, sums, stream);
    case kBFloat16:
      return launch<__nv_bfloat16, true>(f, p, h, dh, of, sums, stream);
    default:
      return launch<__half, true>(f, p, h, dh, of, sums, stream);
  }
}

int64_t channel_aggregation_backward_workspace(const Tensor4& f) {
  return elements(f) == 0 ? 0 : walk_of(f).splits * SumsOfShare(f.size[1]).count * 4;
}

}  // namespace vops
