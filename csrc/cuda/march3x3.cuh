// The walk of kernels that do more than a 3x3 convolution of stride 1 that keeps the size: as in march_conv.cuh a
// thread owns the channels of a word and kStripRows rows and walks along the columns, and the partial sums of the
// columns that it touches move on with the walk. Without dilation there are no sub-lattices.
#pragma once
#include "column_ring.cuh"
#include "grid_model.h"
#include "lattice.cuh"
#include "march.h"

namespace vops {

constexpr int kStripRows = 4, kHaloRows = kStripRows + 2;  // of a strip, and with those around it
template <class T>
constexpr int kWordChannels = 4 / int(sizeof(T));

// Rows of a strip, or with those around it, as a ring of columns.
template <class T, int ROWS>
using Columns = ColumnRing<T, kWordChannels<T>, ROWS, 4>;

// How a map is cut: a unit is the strips and columns that a block walks along at one time, a segment the columns of
// one.
struct Walk {
  Strips strips;
  int64_t channels, units, splits;
  int height, width, channel_blocks, segments, segment_columns, lane_bits;
};

// Of maps like f, for kernels of which an SM holds so many blocks.
template <class T>
Walk cut_walk(const Tensor4& f, int resident) {
  constexpr int V = kWordChannels<T>;
  Walk g;
  g.channels = f.size[1];
  g.height = int(f.size[2]);
  g.width = int(f.size[3]);
  g.strips = cut_rows(f.size[0], g.height, 1, kStripRows);
  g.lane_bits = lane_bits_for(g.channels, V, sizeof(T));
  g.channel_blocks = int(ceil_div(g.channels, int64_t(V) << g.lane_bits));
  const int64_t uncut = ceil_div(g.strips.count, int64_t(kThreads >> g.lane_bits));
  const ColumnCut cut = cut_columns(uncut, g.channel_blocks, g.width, 2, resident);
  g.segments = cut.segments;
  g.segment_columns = ceil_div(g.width, cut.segments);
  g.units = uncut * g.segments;
  g.splits = cut.splits;
  return g;
}

// A thread's place in its block, and the block's among the channels and shares.
struct Lane {
  int lane, lanes, strip, strips, channels;  // channels: of the block
  int64_t channel, split;                    // channel: the first one of the block

  template <int V>
  __device__ __forceinline__ bool has(int v) const {
    return lane * V + v < channels;
  }
};
template <int V>
__device__ __forceinline__ Lane lane_of(const Walk& g) {
  const int lanes = 1 << g.lane_bits;
  const int64_t channel = int64_t(blockIdx.x % g.channel_blocks) * (lanes * V);
  return {int(threadIdx.x) & (lanes - 1),
          lanes,
          int(threadIdx.x) >> g.lane_bits,
          kThreads >> g.lane_bits,
          int(min(int64_t(lanes * V), g.channels - channel)),
          channel,
          blockIdx.x / g.channel_blocks};
}

// A thread's part of a unit: the rows from `row` on and the columns [begin, end) of an image.
struct Unit {
  int64_t image;
  int row, begin, end;
  bool exists;
};
__device__ __forceinline__ Unit unit_of(const Walk& g, const Lane& l, int64_t unit) {
  const StripPlace place = place_of(g.strips, unit / g.segments * l.strips + l.strip);
  const int begin = int(unit % g.segments) * g.segment_columns;
  return {place.image, place.index * kStripRows, begin, min(begin + g.segment_columns, g.width), place.exists};
}

// Rows from `row` on and the columns [begin, end), as far as the map has them; zeros elsewhere.
template <class T, int ROWS>
__device__ __forceinline__ Columns<T, ROWS> columns_of(T* ring, const Pixels& p, int piece, const Walk& g,
                                                       const Lane& l, const Unit& u, int row, int begin, int end) {
  return {ring,
          static_cast<const T*>(p.data) + u.image * p.image + row * p.row + l.channel,
          uint32_t(p.row),
          p.column,
          existing<ROWS>(row, g.height, u.exists),
          l.lane,
          g.lane_bits,
          l.channels,
          piece,
          max(begin, 0),
          min(end, g.width)};
}

// Where a thread's first number of column 0 is.
template <class T>
__device__ __forceinline__ T* own_row(const Pixels& p, const Lane& l, const Unit& u) {
  return static_cast<T*>(p.data) + u.image * p.image + u.row * p.row + l.channel + l.lane * kWordChannels<T>;
}

// A column of a strip. whole: a thread's channels can be written at once.
template <class T, int V>
__device__ __forceinline__ void store_column(uint32_t wanted, T* to, uint32_t row_step, const Lane& l, bool whole,
                                             const float (&out)[kStripRows][V]) {
#pragma unroll
  for (int r = 0; r < kStripRows; r++) {
    T* at = to + uint64_t(row_step) * r;
    if (V == 1 || whole) {
      store_if<T, V>(wanted & 1u << r, at, out[r]);
    } else {
#pragma unroll
      for (int v = 0; v < V; v++) store_if<T, 1>((wanted & 1u << r) && l.has<V>(v), at + v, {out[r][v]});
    }
  }
}

// Weights pass through shared memory: a thread's own are 9 apart from its neighbour's. Channels that are not there get
// those of the first one.
template <int V>
__device__ __forceinline__ void load_taps(const void* from, int dtype, const Lane& l, float* smem, float (&w)[9][V]) {
  for (int i = threadIdx.x; i < l.channels * 9; i += kThreads)
    smem[i] = load_scalar<float>(from, dtype, l.channel * 9 + i);
  __syncthreads();
#pragma unroll
  for (int v = 0; v < V; v++)
#pragma unroll
    for (int k = 0; k < 9; k++) w[k][v] = smem[(l.has<V>(v) ? l.lane * V + v : 0) * 9 + k];
  __syncthreads();
}

// Sums of threads to sums[number][channel] of the block, whose strips add up in order, one at a time.
template <int NUMBERS, int V>
__device__ __forceinline__ void add_strips(const float (&own)[NUMBERS][V], const Lane& l, float* sums) {
#pragma unroll 1
  for (int strip = 0; strip < l.strips; strip++) {
    __syncthreads();
    if (strip != l.strip) continue;
#pragma unroll
    for (int k = 0; k < NUMBERS; k++)
#pragma unroll
      for (int v = 0; v < V; v++) {
        float& sum = sums[(k * l.lanes + l.lane) * V + v];
        sum = strip ? sum + own[k][v] : own[k][v];
      }
  }
  __syncthreads();
}

}  // namespace vops
