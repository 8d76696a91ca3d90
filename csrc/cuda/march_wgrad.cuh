// Weight and bias gradient of the depthwise convolution, in a fixed order: the same bits on every run.
//
// Stage 1 marches as the convolution does, with x and dy in column rings. A thread keeps the K * K gradients of its V
// channels in registers while it walks over its share of the strips; the block adds its strips one after another and
// writes one row of partial[splits][K * K + 1][channels]. Stage 2 (dwconv_plain.cu) adds the splits.
#pragma once
#include "grid_model.h"
#include "march.h"

namespace vops {
namespace {

struct WgradGrid {
  Strips strips;
  int64_t groups, splits;  // a group: the strips that a block handles at one time
  int channel_blocks, lane_bits, x_piece, dy_piece;
};

// DOWN: the stride. dy columns are processed two at a time, so that the window of them moves half as often.
template <class T, int K, int DOWN, int V, int R, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS) march_wgrad_kernel(MarchWgrad m, WgradGrid g) {
  constexpr int kRows = DOWN * (R - 1) + K, kWindow = (K - 1) / DOWN + 1, kTogether = 2;
  using XRing = ColumnRing<T, V, kRows, 4>;
  using DyRing = ColumnRing<T, V, R, 4 / DOWN>;
  constexpr int kChunk = DyRing::kChunk;
  static_assert(kChunk % kTogether == 0, "a chunk is whole steps");
  VOPS_DYN_SMEM(float, smem);  // the rings; afterwards the sums of the block

  const int lanes = 1 << g.lane_bits, lane = int(threadIdx.x) & (lanes - 1), strips = kThreads >> g.lane_bits;
  const int own_strip = int(threadIdx.x) >> g.lane_bits;
  const int64_t block_channel = int64_t(blockIdx.x % g.channel_blocks) * (lanes * V);
  const int64_t split = blockIdx.x / g.channel_blocks;
  const int channels = int(min(int64_t(lanes * V), m.channels - block_channel));

  float dw[K * K][V], db[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    db[v] = 0.f;
#pragma unroll
    for (int k = 0; k < K * K; k++) dw[k][v] = 0.f;
  }

#pragma unroll 1
  for (int64_t group = split; group < g.groups; group += g.splits) {
    const StripPlace place = place_of(g.strips, group / m.columns.dilation * strips + own_strip);
    const Phase rows = phase_of(m.rows, place.phase);
    const Phase columns = phase_of(m.columns, int(group % m.columns.dilation));
    const int row0 = place.index * R, in_row0 = DOWN * row0 + rows.shift;
    const int row_step = m.rows.dilation, column_step = m.columns.dilation;
    const auto address = [&](const Pixels& p, int row, int column) {
      return static_cast<const T*>(p.data) + place.image * p.image + row * p.row + column * p.column + block_channel;
    };
    const XRing x = {reinterpret_cast<T*>(smem),
                     address(m.x, rows.in0 + in_row0 * row_step, columns.in0 + columns.shift * column_step),
                     uint32_t(row_step * m.x.row),
                     column_step * m.x.column,
                     existing<kRows>(in_row0, rows.in, place.exists),
                     lane,
                     g.lane_bits,
                     channels,
                     g.x_piece,
                     -columns.shift,
                     columns.in - columns.shift};
    const DyRing dy = {reinterpret_cast<T*>(smem) + XRing::kElements,
                       address(m.dy, rows.out0 + row0 * row_step, columns.out0),
                       uint32_t(row_step * m.dy.row),
                       column_step * m.dy.column,
                       existing<R>(row0, rows.out, place.exists),
                       lane,
                       g.lane_bits,
                       channels,
                       g.dy_piece,
                       0,
                       columns.out};

    // Step t takes dy column t into the window and multiplies with the x columns DOWN * t + [0, DOWN). Before x begins
    // only the window moves; after dy has ended only zeros enter it.
    const int t0 = floor_div(-columns.shift, DOWN);
    const int t1 = min(columns.out + kWindow - 1, -floor_div(-(columns.in - columns.shift), DOWN));
    const int steps = max(columns.out, t1);
    float window[kWindow - 1 + kTogether][R][V];  // [j]: dy column t - (kWindow - 1) + j
#pragma unroll
    for (int j = 0; j < kWindow - 1; j++)
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int v = 0; v < V; v++) window[j][r][v] = 0.f;

#pragma unroll 1
    for (int chunk = -kChunk; chunk < steps; chunk += kChunk) {  // the first one only fetches
      copy_wait();
      __syncwarp();  // the chunk is there, and all have left the one before, which the next one replaces
      x.fetch(DOWN * (chunk + kChunk));
      dy.fetch(chunk + kChunk);
      copy_commit();
      const int end = chunk < 0 ? 0 : chunk + kChunk;
#pragma unroll 1
      for (int t = max(chunk, 0); t < end; t += kTogether) {
#pragma unroll
        for (int u = 0; u < kTogether; u++)
#pragma unroll
          for (int r = 0; r < R; r++) {
            const Channels<T, V> raw = dy.at(r, t + u);
#pragma unroll
            for (int v = 0; v < V; v++) {
              window[kWindow - 1 + u][r][v] = channel<T, V>(raw, v);
              db[v] += window[kWindow - 1 + u][r][v];
            }
          }
        if (t + kTogether > t0 && t < t1) {
#pragma unroll
          for (int u = 0; u < kTogether; u++)
#pragma unroll
            for (int s = 0; s < DOWN; s++)
#pragma unroll
              for (int i = 0; i < kRows; i++) {
                const Channels<T, V> raw = x.at(i, DOWN * (t + u) + s);
#pragma unroll
                for (int r = 0; r < R; r++) {
                  const int k = i - DOWN * r;
                  if (k < 0 || k >= K) continue;
#pragma unroll
                  for (int j = 0; j < kWindow; j++) {
                    const int l = DOWN * (kWindow - 1 - j) + s;
                    if (l >= K) continue;
#pragma unroll
                    for (int v = 0; v < V; v++) {
                      float& sum = dw[k * K + l][v];
                      sum = fmaf(window[u + j][r][v], channel<T, V>(raw, v), sum);
                    }
                  }
                }
              }
        }
#pragma unroll
        for (int j = 0; j < kWindow - 1; j++)
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int v = 0; v < V; v++) window[j][r][v] = window[j + kTogether][r][v];
      }
    }
  }
  copy_wait();

  // The strips of the block add up in order, one at a time.
  const int pixel = lanes * V;
#pragma unroll 1
  for (int strip = 0; strip < strips; strip++) {
    __syncthreads();
    if (strip != own_strip) continue;
#pragma unroll
    for (int k = 0; k <= K * K; k++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        float* sum = &smem[k * pixel + lane * V + v];
        const float own = k < K * K ? dw[k < K * K ? k : 0][v] : db[v];
        *sum = strip ? *sum + own : own;
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (K * K + 1) << g.lane_bits; i += kThreads)
#pragma unroll
    for (int v = 0; v < V; v++) {
      const int k = i >> g.lane_bits, c = (i & (lanes - 1)) * V + v;
      if (c < channels) m.partial[(split * (K * K + 1) + k) * m.channels + block_channel + c] = smem[k * pixel + c];
    }
}

template <class T, int V, int R, int BLOCKS>
WgradGrid wgrad_grid(const MarchWgrad& m) {
  WgradGrid g;
  g.lane_bits = lane_bits_for(m.channels, V, sizeof(T));
  g.strips = cut_rows(m.images, ceil_div(m.rows.out, m.rows.dilation), m.rows.dilation, R);
  g.groups = ceil_div(g.strips.count, int64_t(kThreads >> g.lane_bits)) * m.columns.dilation;
  g.channel_blocks = int(ceil_div(m.channels, int64_t(V) << g.lane_bits));
  g.splits = cut_units(g.groups, g.channel_blocks, BLOCKS, 1, kGroupsOfWgradBlock).splits;
  return g;
}

template <class T, int K, int DOWN>
struct WgradShape {  // chosen by the FMA share of the compiled loop and its registers: README.md
  static constexpr int kChannels = K <= 5 && sizeof(T) == 2 ? 2 : 1;
  static constexpr int kStripRows = DOWN == 2 ? 4 : 7;
  static constexpr int kBlocks = K == 9 || (K == 7 && sizeof(T) == 4) ? 2 : 3;
};

template <class T, int K, int DOWN>
Error launch_wgrad(const MarchWgrad& m, cudaStream_t stream) {
  using Shape = WgradShape<T, K, DOWN>;
  constexpr int V = Shape::kChannels, R = Shape::kStripRows, kRows = DOWN * (R - 1) + K;
  constexpr int kRings = (ColumnRing<T, V, kRows, 4>::kElements + ColumnRing<T, V, R, 4 / DOWN>::kElements) * sizeof(T);
  constexpr int kSums = 32 * V * (K * K + 1) * 4, kShared = kRings > kSums ? kRings : kSums;
  static_assert(Shape::kBlocks * (kShared + 1024) <= kSharedMemoryPerSm, "shared memory holds fewer blocks");
  const auto kernel = &march_wgrad_kernel<T, K, DOWN, V, R, Shape::kBlocks>;
  if (const Error error = allow_shared_memory(kernel, kShared)) return error;

  WgradGrid g = wgrad_grid<T, V, R, Shape::kBlocks>(m);
  const int size = sizeof(T), most = V * size << g.lane_bits;
  g.x_piece = piece_bytes(m.x.data, m.x.image, m.x.row, m.x.column, m.channels, size, most);
  g.dy_piece = piece_bytes(m.dy.data, m.dy.image, m.dy.row, m.dy.column, m.channels, size, most);
  const int64_t in = m.images * m.channels * m.rows.in * m.columns.in;
  const int64_t out = m.images * m.channels * m.rows.out * m.columns.out, columns = m.columns.out / m.columns.dilation;
  VOPS_COST((in + out) * size, g.splits * m.channels * (K * K + 1) * 4,
            g.groups * g.channel_blocks * columns * kThreads * V * R * K * K);
  VOPS_LAUNCH((march_wgrad_kernel<T, K, DOWN, V, R, Shape::kBlocks>), dim3(unsigned(g.splits * g.channel_blocks)),
              kThreads, kShared, stream, m, g);
  if (const Error error = error_text(cudaGetLastError())) return error;
  return add_splits<float>({m.scale, m.partial, g.splits, m.channels, K * K, m.dw_dtype, m.db_dtype, m.dw, m.db},
                           stream);
}

template <class T, int K>
int64_t splits_of(const MarchWgrad& m) {
  using One = WgradShape<T, K, 1>;
  using Two = WgradShape<T, K, 2>;
  if (K == 3 && m.rows.stride == 2) return wgrad_grid<T, Two::kChannels, Two::kStripRows, Two::kBlocks>(m).splits;
  return wgrad_grid<T, One::kChannels, One::kStripRows, One::kBlocks>(m).splits;
}

template <class T, int K>
Error choose_wgrad(const MarchWgrad& m, cudaStream_t stream) {
  if constexpr (K == 3) {
    if (m.rows.stride == 2) return launch_wgrad<T, K, 2>(m, stream);
  }
  return launch_wgrad<T, K, 1>(m, stream);
}

}  // namespace

template <int K>
Error march_wgrad(const MarchWgrad& m, cudaStream_t stream) {
  switch (m.dtype) {
    case kFloat32:
      return choose_wgrad<float, K>(m, stream);
    case kBFloat16:
      return choose_wgrad<__nv_bfloat16, K>(m, stream);
    default:
      return choose_wgrad<__half, K>(m, stream);
  }
}
template <int K>
int64_t march_wgrad_splits(const MarchWgrad& m) {
  return m.dtype == kFloat32 ? splits_of<float, K>(m) : splits_of<__half, K>(m);
}

}  // namespace vops
