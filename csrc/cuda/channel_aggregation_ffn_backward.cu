// The gradients of the channel aggregation's convolution in one walk: df[q] = sum of w[tap] * du[q - tap] and
// dw[tap] = sum of f[q] * du[q - tap] read the same du around q.
#include "channel_aggregation_ffn.cuh"

namespace vops {
namespace {

struct AggregationGradients {
  Pixels du, f, df;
  const void* w;
  int w_dtype;
  float* sums;
  int du_piece, f_piece;
  bool whole_words;  // of df
};

template <class T, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS) march_aggregation_gradients_kernel(AggregationGradients a, Walk g) {
  constexpr int V = kWordChannels<T>, R = kStripRows, kSums = 11;
  using Input = Columns<T, kHaloRows>;
  VOPS_DYN_SMEM(float, smem);  // the block's weights; then the rings, then its sums
  T* rings = reinterpret_cast<T*>(smem);
  const Lane l = lane_of<V>(g);
  float w[9][V];
  load_taps<V>(a.w, a.w_dtype, l, smem, w);
  float own[kSums][V];  // of the taps, of du, of df
#pragma unroll
  for (int k = 0; k < kSums; k++)
#pragma unroll
    for (int v = 0; v < V; v++) own[k][v] = 0.f;

#pragma unroll 1
  for (int64_t unit = blockIdx.x / g.channel_blocks; unit < g.units; unit += g.splits) {
    const Unit u = unit_of(g, l, unit);
    const Input du = columns_of<T, kHaloRows>(rings, a.du, a.du_piece, g, l, u, u.row - 1, u.begin - 1, u.end + 1);
    const Columns<T, R> f = columns_of<T, R>(rings + Input::kElements, a.f, a.f_piece, g, l, u, u.row, u.begin, u.end);
    const uint32_t rows = l.has<V>(0) ? existing<R>(u.row, g.height, u.exists) : 0;
    T* df = own_row<T>(a.df, l, u) + u.begin * a.df.column;

    Channels<T, V> window[3][R];  // columns q - 1, q, q + 1 of f
    float sum[3][R][V];           // and of df
#pragma unroll
    for (int j = 0; j < 3; j++)
#pragma unroll
      for (int r = 0; r < R; r++) {
        window[j][r] = {};
#pragma unroll
        for (int v = 0; v < V; v++) sum[j][r][v] = 0.f;
      }

#pragma unroll 1
    for (int chunk = u.begin - 1 - Input::kChunk; chunk <= u.end;
         chunk += Input::kChunk) {  // the first one only fetches
      copy_wait();
      __syncwarp();  // the chunk is there, and all have left the one before, which the next one replaces
      du.fetch(chunk + Input::kChunk);
      f.fetch(chunk + Input::kChunk + 1);
      copy_commit();
      const int end = min(chunk + Input::kChunk, u.end + 1);
#pragma unroll 1
      for (int q = max(chunk, u.begin - 1); q < end; q++) {
#pragma unroll
        for (int r = 0; r < R; r++) window[2][r] = f.at(r, q + 1);
#pragma unroll
        for (int i = 0; i < kHaloRows; i++) {
          const Channels<T, V> raw = du.at(i, q);
#pragma unroll
          for (int r = 0; r < R; r++) {
            const int k = r + 2 - i;  // du lies below where it is read by the first row of taps
            if (k < 0 || k >= 3) continue;
#pragma unroll
            for (int j = 0; j < 3; j++)
#pragma unroll
              for (int v = 0; v < V; v++) {
                const float before = k < 2 ? sum[j][r][v] : j < 2 ? sum[j < 2 ? j + 1 : j][r][v] : 0.f;
                sum[j][r][v] = fmaf(w[k * 3 + j][v], channel<T, V>(raw, v), before);
                own[k * 3 + j][v] = fmaf(channel<T, V>(window[j][r], v), channel<T, V>(raw, v), own[k * 3 + j][v]);
              }
          }
          if (i > 0 && i <= R && q >= u.begin && q < u.end) {
#pragma unroll
            for (int v = 0; v < V; v++) own[9][v] += channel<T, V>(raw, v);
          }
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
          window[0][r] = window[1][r];
          window[1][r] = window[2][r];
        }
        if (q <= u.begin) continue;
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
          for (int v = 0; v < V; v++) own[10][v] += rows & 1u << r ? sum[0][r][v] : 0.f;
        store_column<T, V>(rows, df, uint32_t(a.df.row), l, a.whole_words, sum[0]);
        df += a.df.column;
      }
    }
    copy_wait();
  }

  add_strips(own, l, smem);
  const SumsOfShare row(g.channels);
  float* sums = a.sums + l.split * row.count;
  const int pixel = l.lanes * V;
  for (int i = threadIdx.x; i < l.channels * 9; i += kThreads) sums[l.channel * 9 + i] = smem[i % 9 * pixel + i / 9];
  for (int c = threadIdx.x; c < l.channels; c += kThreads) {
    sums[row.bias + l.channel + c] = smem[9 * pixel + c];
    sums[row.df + l.channel + c] = smem[10 * pixel + c];
  }
}

template <class T>
Error launch(const Tensor4& du, const Tensor4& f, const Tensor4& w, const Tensor4& df, float* sums,
             cudaStream_t stream) {
  const Walk g = walk_of(f);
  constexpr int kRings = (Columns<T, kHaloRows>::kElements + Columns<T, kStripRows>::kElements) * sizeof(T);
  static_assert(kResident * (kRings + 1024) <= kSharedMemoryPerSm, "shared memory holds fewer blocks than declared");
  const AggregationGradients a = {pixels(du),         pixels(f),         pixels(df),        w.data, w.dtype, sums,
                                  piece_of<T>(du, g), piece_of<T>(f, g), whole_words<T>(df)};
  const int64_t numbers = f.size[0] * f.size[1] * f.size[2] * f.size[3], size = sizeof(T);
  VOPS_COST(2 * numbers * size + f.size[1] * 9 * 4, numbers * size + g.splits * f.size[1] * 11 * 4, numbers * 18);
  VOPS_LAUNCH((march_aggregation_gradients_kernel<T, kResident>), dim3(unsigned(g.splits * g.channel_blocks)), kThreads,
              kRings, stream, a, g);
  return error_text(cudaGetLastError());
}

}  // namespace

Error channel_aggregation_backward_input_cuda(const Tensor4& du, const Tensor4& f, const Tensor4& w, const Tensor4& df,
                                              void* workspace, CudaTarget target) {
  if (elements(f) == 0) return nullptr;
  const DeviceGuard guard(target.device);
  if (guard.error) return guard.error;
  const auto stream = static_cast<cudaStream_t>(target.stream);
  const auto sums = static_cast<float*>(workspace);
  switch (f.dtype) {
    case kFloat32:
      return launch<float>(du, f, w, df, sums, stream);
    case kBFloat16:
      return launch<__nv_bfloat16>(du, f, w, df, sums, stream);
    default:
      return launch<__half>(du, f, w, df, sums, stream);
  }
}

}  // namespace vops
