// Depthwise convolution by marching: forward, and the gradient of the input.
//
// A thread owns V channels and R output rows of one sub-lattice and walks along the columns. It holds all K * K weights
// and the partial sums of the output columns that the current input column still touches, and reads an input element
// once for up to K * K multiply-adds. The partial sums move on with the walk. This costs nothing: the first FMA of a
// row in a step reads the sum of a later column and writes that of an earlier one, so the loop needs no unrolling by K
// and stays small.
#pragma once
#include "activation.cuh"
#include "grid_model.h"
#include "march.h"

namespace vops {
namespace {

struct MarchGrid {
  Strips strips;
  int64_t units, splits;  // a unit: the strips and columns that a block walks along at one time; blocks side by side
  int channel_blocks, segments, segment_columns;  // a segment: the output columns of a unit
  int lane_bits, piece;
  bool whole_vectors;  // y can be written V channels at a time
};

// DOWN: input columns per step, the stride of the convolution. UP: output columns per step, 2 for the transpose at
// stride 2, where a step scatters one input column and every tap meets just the output parity that it belongs to.
// BLOCKS: how many have to be resident per SM, which bounds the registers.
template <class T, int K, int DOWN, int UP, int V, int R, bool EPILOGUE, int BLOCKS>
__global__ void __launch_bounds__(kThreads, BLOCKS) march_kernel(March m, MarchGrid g) {
  static_assert(DOWN * UP <= 2 && R % UP == 0, "one of the two strides");
  // Sums in flight per row, and which output column the first of them is in step 0.
  constexpr int kSums = UP == 2 ? K : (K - 1) / DOWN + 1, kFirst = UP == 2 ? 0 : 1 - kSums;
  constexpr int kRows = UP == 2 ? R / 2 + K / 2 : DOWN * (R - 1) + K;  // input rows of a strip
  using Ring = ColumnRing<T, V, kRows, 4>;
  VOPS_DYN_SMEM(float, smem);  // the block's weights; afterwards the ring

  const int lanes = 1 << g.lane_bits, lane = int(threadIdx.x) & (lanes - 1), strips = kThreads >> g.lane_bits;
  const int64_t block_channel = int64_t(blockIdx.x % g.channel_blocks) * (lanes * V);
  const int channels = int(min(int64_t(lanes * V), m.channels - block_channel));

  // Weights pass through shared memory: a thread's own are K * K apart from its neighbour's.
  for (int i = threadIdx.x; i < channels * K * K; i += kThreads)
    smem[i] = load_scalar<float>(m.w, m.w_dtype, block_channel * K * K + i);
  __syncthreads();
  const bool idle = lane * V >= channels;  // still copies for its strip
  float w[K * K][V], bias[V];
#pragma unroll
  for (int v = 0; v < V; v++) {
    const int c = lane * V + v < channels ? lane * V + v : 0;
#pragma unroll
    for (int k = 0; k < K * K; k++) w[k][v] = smem[c * K * K + (m.kind == March::kReversed ? K * K - 1 - k : k)];
    bias[v] = m.b ? load_scalar<float>(m.b, m.b_dtype, block_channel + c) : 0.f;
  }
  __syncthreads();

#pragma unroll 1
  for (int64_t unit = blockIdx.x / g.channel_blocks; unit < g.units; unit += g.splits) {
    const int segment = int(unit % g.segments);
    const int64_t of_columns = unit / g.segments;
    const int column_phase = int(of_columns % m.columns.dilation);
    const int64_t strip = of_columns / m.columns.dilation * strips + (threadIdx.x >> g.lane_bits);
    const StripPlace place = place_of(g.strips, strip);
    const Phase rows = UP == 2 ? reversed_phase_of(m.rows, place.phase) : phase_of(m.rows, place.phase);
    const Phase columns = UP == 2 ? reversed_phase_of(m.columns, column_phase) : phase_of(m.columns, column_phase);
    // At UP = 2 output points are counted from -shift, rows of a strip from an even one.
    const int row0 = place.index * R + (UP == 2 ? -rows.shift & ~1 : 0), out_row0 = UP == 2 ? row0 + rows.shift : row0;
    const int in_row0 = UP == 2 ? row0 / 2 - K / 2 : DOWN * row0 + rows.shift;
    const int in_shift = UP == 2 ? 0 : columns.shift, out_shift = UP == 2 ? columns.shift : 0;
    const uint32_t out_rows = idle ? 0 : existing<R>(out_row0, rows.out, place.exists);

    const int c0 = segment * g.segment_columns - out_shift, c1 = min(c0 + g.segment_columns, columns.out - out_shift);
    // The steps that touch them, as far as there are input columns; outputs that miss all input are done after the
    // steps.
    const int touched0 = -floor_div(-(c0 - kFirst - kSums + 1), UP), touched1 = -floor_div(-(c1 - kFirst), UP);
    const int t0 = max(touched0, min(floor_div(-in_shift, DOWN), floor_div(c0 - kFirst, UP)));
    const int t1 = max(t0, min(touched1, -floor_div(-(columns.in - in_shift), DOWN)));

    const int row_step = m.rows.dilation, column_step = m.columns.dilation;
    const auto address = [&](const Pixels& p, int row, int column) {
      return static_cast<T*>(p.data) + place.image * p.image + row * p.row + column * p.column + block_channel;
    };
    const Ring x = {reinterpret_cast<T*>(smem),
                    address(m.x, rows.in0 + in_row0 * row_step, columns.in0 + in_shift * column_step),
                    uint32_t(row_step * m.x.row),
                    column_step * m.x.column,
                    existing<kRows>(in_row0, rows.in, place.exists),
                    lane,
                    g.lane_bits,
                    channels,
                    g.piece,
                    -in_shift,
                    columns.in - in_shift};

    int next = UP * t0 + kFirst;  // output column of sum[0]
    const auto at_next = [&](const Pixels& p) {
      return address(p, rows.out0 + out_row0 * row_step, columns.out0 + (next + out_shift) * column_step) + lane * V;
    };
    T* y = at_next(m.y);
    const T* dy = EPILOGUE && m.dy.data ? at_next(m.dy) : nullptr;
    const uint32_t y_row = uint32_t(row_step * m.y.row), dy_row = uint32_t(row_step * m.dy.row);

    float sum[kSums][R][V];
#pragma unroll
    for (int j = 0; j < kSums; j++)
#pragma unroll
      for (int r = 0; r < R; r++)
#pragma unroll
        for (int v = 0; v < V; v++) sum[j][r][v] = bias[v];

    const auto store_columns = [&] {
#pragma unroll
      for (int u = 0; u < UP; u++) {
        const uint32_t wanted = next >= c0 && next < c1 ? out_rows : 0;
        float (&out)[R][V] = sum[u];  // may be overwritten: the next step reads sum[UP] and later
        if constexpr (EPILOGUE) {
          if (m.act != kNoActivation) {
#pragma unroll
            for (int r = 0; r < R; r++)
#pragma unroll
              for (int v = 0; v < V; v++) {
                if (!m.dy.data) {
                  out[r][v] = activate(out[r][v], m.act);
                } else if ((wanted >> r & 1) && lane * V + v < channels) {
                  out[r][v] = static_cast<float>(dy[uint64_t(dy_row) * r + v]) * activation_slope(out[r][v], m.act);
                }
              }
          }
          if (m.dy.data) dy += column_step * m.dy.column;
        }
        if (V == 1 || g.whole_vectors) {
#pragma unroll
          for (int r = 0; r < R; r++) store_if<T, V>(wanted & 1u << r, y + uint64_t(y_row) * r, out[r]);
        } else {
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int v = 0; v < V; v++)
              store_if<T, 1>((wanted & 1u << r) && lane * V + v < channels, y + uint64_t(y_row) * r + v, {out[r][v]});
        }
        next++;
        y += column_step * m.y.column;
      }
    };

    constexpr int kSteps = Ring::kChunk / DOWN;  // per chunk
#pragma unroll 1
    for (int chunk = t0 - kSteps; chunk < t1; chunk += kSteps) {  // the first one only fetches
      copy_wait();
      __syncwarp();  // the chunk is there, and all have left the one before, which the next one replaces
      x.fetch(DOWN * (chunk + kSteps));
      copy_commit();
      const int end = min(chunk + kSteps, t1);
#pragma unroll 1
      for (int t = max(chunk, t0); t < end; t++) {
#pragma unroll
        for (int s = 0; s < DOWN; s++)
#pragma unroll
          for (int i = 0; i < kRows; i++) {
            const Channels<T, V> raw = x.at(i, DOWN * t + s);
#pragma unroll
            for (int r = 0; r < R; r++) {
              const int k = UP == 2 ? r + K - 1 - 2 * i : i - DOWN * r;
              if (k < 0 || k >= K) continue;
              const bool first = UP == 2 ? k >= K - 2 : k == 0 && s == 0;  // of the FMAs of row r in this step
#pragma unroll
              for (int j = 0; j < kSums; j++) {
                const int l = UP == 2 ? j : s + DOWN * (kSums - 1 - j);
                if (l >= K) continue;
#pragma unroll
                for (int v = 0; v < V; v++) {
                  const float before = !first           ? sum[j][r][v]
                                       : j + UP < kSums ? sum[j + UP < kSums ? j + UP : j][r][v]
                                                        : bias[v];
                  sum[j][r][v] = fmaf(w[k * K + l][v], channel<T, V>(raw, v), before);
                }
              }
            }
          }
        store_columns();
      }
    }
    copy_wait();
    // Output columns that wait for input columns beyond the image are complete as they are.
#pragma unroll 1
    while (next < c1) {
#pragma unroll
      for (int j = 0; j < kSums; j++)
#pragma unroll
        for (int r = 0; r < R; r++)
#pragma unroll
          for (int v = 0; v < V; v++) sum[j][r][v] = j + UP < kSums ? sum[j + UP < kSums ? j + UP : j][r][v] : bias[v];
      store_columns();
    }
  }
}

struct MarchPlan {
  MarchGrid grid;
  int64_t blocks;
  double time;  // to compare plans
};

// For strips of `rows` rows. The columns are cut, too, where that fills the SMs better; every cut reads some twice.
template <class T, int K, int DOWN, int UP, int V>
MarchPlan plan_march(const March& m, int rows, int resident) {
  MarchPlan p;
  MarchGrid& g = p.grid;
  const int dilation = m.rows.dilation, size = sizeof(T);
  // The rows of a transposed strip start at an even one, which may lie before the image.
  const int out_rows = UP == 2 ? m.rows.in : m.rows.out, out_columns = UP == 2 ? m.columns.in : m.columns.out;
  const int before = UP == 2 && (dilation > 1 || m.rows.pad % 2 != 0);
  g.strips = cut_rows(m.images, ceil_div(out_rows, dilation) + before, dilation, rows);
  g.lane_bits = lane_bits_for(m.channels, V, size);
  g.channel_blocks = int(ceil_div(m.channels, int64_t(V) << g.lane_bits));
  g.piece = piece_bytes(m.x.data, m.x.image, m.x.row, m.x.column, m.channels, size, V * size << g.lane_bits);
  g.whole_vectors = piece_bytes(m.y.data, m.y.image, m.y.row, m.y.column, m.channels, size, V * size) == V * size;
  const int64_t phases = m.columns.dilation, columns = ceil_div(out_columns, m.columns.dilation);
  const int64_t uncut = ceil_div(g.strips.count, int64_t(kThreads >> g.lane_bits)) * phases;
  const ColumnCut cut = cut_columns(uncut, g.channel_blocks, columns, (K - 1) / DOWN, resident);
  g.segments = cut.segments;
  g.segment_columns = int(ceil_div(columns, int64_t(g.segments)));
  g.units = uncut * g.segments;
  g.splits = cut.splits;
  p.blocks = g.splits * g.channel_blocks;
  p.time = cut.time * rows;
  return p;
}

template <class T, int K, int DOWN, int UP, int V, int R, bool EPILOGUE, int BLOCKS>
Error launch_march(const March& m, cudaStream_t stream) {
  constexpr int kRows = UP == 2 ? R / 2 + K / 2 : DOWN * (R - 1) + K;
  constexpr int kRing = ColumnRing<T, V, kRows, 4>::kElements * int(sizeof(T)), kWeights = 32 * V * K * K * 4;
  constexpr int kShared = kRing > kWeights ? kRing : kWeights;
  static_assert(BLOCKS * (kShared + 1024) <= kSharedMemoryPerSm, "shared memory holds fewer blocks than declared");
  const auto kernel = &march_kernel<T, K, DOWN, UP, V, R, EPILOGUE, BLOCKS>;
  if (const Error error = allow_shared_memory(kernel, kShared)) return error;

  const MarchPlan plan = plan_march<T, K, DOWN, UP, V>(m, R, BLOCKS);
  const MarchGrid& g = plan.grid;
  if (plan.blocks > INT32_MAX) return "the convolution has more than 2**31 blocks of work";
  const int64_t size = sizeof(T), steps = g.units * g.channel_blocks * g.segment_columns;
  const int64_t in = m.images * m.channels * m.rows.in * m.columns.in;
  const int64_t out = m.images * m.channels * m.rows.out * m.columns.out;
  const int64_t reads = (UP == 2 ? out : in) + (m.dy.data ? out : 0);
  VOPS_COST(reads * size + m.channels * K * K * 4, (UP == 2 ? in : out) * size,
            steps * kThreads * V * R * K * K / (UP * UP));
  VOPS_LAUNCH((march_kernel<T, K, DOWN, UP, V, R, EPILOGUE, BLOCKS>), dim3(unsigned(plan.blocks)), kThreads, kShared,
              stream, m, g);
  return error_text(cudaGetLastError());
}

// V, R and blocks per SM were chosen by the FMA share of the compiled loop and its registers: README.md.
template <class T, int K>
Error choose_march(const March& m, cudaStream_t stream) {
  constexpr int V = K == 9 || (K == 7 && sizeof(T) == 4) ? 1 : 2;
  if constexpr (K == 3) {  // the one kernel size that the published networks have at stride 2
    if (m.kind == March::kTransposed) return launch_march<T, K, 1, 2, V, 4, false, 4>(m, stream);
    if (m.rows.stride == 2) return launch_march<T, K, 2, 1, V, 4, true, sizeof(T) == 2 ? 4 : 2>(m, stream);
    return launch_march<T, K, 1, 1, V, 4, true, 4>(m, stream);
  } else if constexpr (K == 9) {
    return launch_march<T, K, 1, 1, V, 8, true, 2>(m, stream);
  } else {
    // Strips of 4 rows repeat more of their work per output, by a twentieth of their time, but waste less where 7 does
    // not divide the rows, as with dilation, and leave registers for the epilogue. In fp32 K = 5 is bound by memory
    // either way.
    constexpr int kBlocks = V == 1 || K == 5 ? (sizeof(T) == 4 && V == 2 ? 2 : 3) : 2;
    if constexpr (K == 7 || sizeof(T) == 2) {
      const auto time = [&](int rows) { return plan_march<T, K, 1, 1, V>(m, rows, kBlocks).time; };
      if (m.act == kNoActivation && time(7) <= 1.05 * time(4)) {
        return launch_march<T, K, 1, 1, V, 7, false, kBlocks>(m, stream);
      }
    }
    return launch_march<T, K, 1, 1, V, 4, true, kBlocks>(m, stream);
  }
}

}  // namespace

template <int K>
Error march(const March& m, cudaStream_t stream) {
  switch (m.dtype) {
    case kFloat32:
      return choose_march<float, K>(m, stream);
    case kBFloat16:
      return choose_march<__nv_bfloat16, K>(m, stream);
    default:
      return choose_march<__half, K>(m, stream);
  }
}

}  // namespace vops
