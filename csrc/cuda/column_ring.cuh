// The rows of a strip as a ring of columns in shared memory, filled by the lanes that share the strip and private to
// them: a warp never waits for another.
#pragma once
#include "channels.cuh"

namespace vops {

// Element strides of a (N, C, H, W) tensor whose channels are neighbours.
struct Pixels {
  void* data;
  int64_t image, row, column;
};
inline Pixels pixels(const Tensor4& t) { return {t.data, t.stride[0], t.stride[2], t.stride[3]}; }

// One chunk of columns is in use while the next is in flight. A thread's place in a column is fixed and pitches are
// compile-time, so that a row is an immediate in its load.
template <class T, int V, int ROWS, int CHUNK>
struct ColumnRing {
  static constexpr int kChunk = CHUNK, kSlots = 2 * CHUNK, kColumn = kThreads * V, kRow = kSlots * kColumn;
  static constexpr int kElements = ROWS * kRow;

  T* ring;            // [ROWS][kSlots][kColumn]
  const T* source;    // row 0, column 0, first channel of the block
  uint32_t row_step;  // in elements; 32 bits, so that row_step * row is one IMAD.WIDE
  int64_t column_step;
  uint32_t rows;        // bit i: row i exists
  int lane, lane_bits;  // 1 << lane_bits threads share a strip
  int channels, piece;  // of the block; bytes per copy: 16, 8, 4 or 2
  int begin, end;       // the columns that exist

  // Columns [q, q + CHUNK), zeros where there are none. Commit afterwards.
  __device__ __forceinline__ void fetch(int q) const {
    if (piece == 16) {
      fetch_pieces<16>(q);
    } else if (piece == 8) {
      fetch_pieces<8>(q);
    } else if (piece == 4) {
      fetch_pieces<4>(q);
    } else if constexpr (sizeof(T) == 2) {
      fetch_pieces<2>(q);
    }
  }

  __device__ __forceinline__ Channels<T, V> at(int row, int q) const {
    return load<T, V>(ring + row * kRow + (q & (kSlots - 1)) * kColumn + int(threadIdx.x) * V);
  }

 private:
  // The lanes of a strip copy kPixels pixels in one step. A lane's row and column within a step are fixed, so a step is
  // one IMAD.WIDE, a bit test and the copy.
  template <int BYTES>
  __device__ __forceinline__ void fetch_pieces(int q) const {
    constexpr int kPiece = BYTES / int(sizeof(T)), kPixels = kPiece < V ? 1 : kPiece / V;
    constexpr int kPixelBits = kPixels == 8 ? 3 : kPixels == 4 ? 2 : kPixels == 2 ? 1 : 0;
    constexpr int kSteps = ceil_div(ROWS * CHUNK, kPixels);
    [[maybe_unused]] constexpr int kUnroll = BYTES >= 8 ? kSteps : 4;  // the narrow ones are rare
    constexpr int kOwn = kPiece < V ? V / kPiece : 1;                  // pieces of a thread per pixel
    const int own = opaque(lane), bits = lane_bits - kPixelBits, part = (own & ((1 << bits) - 1)) * kPiece * kOwn;
    const int pixel0 = own >> bits, row0 = pixel0 / CHUNK, column0 = pixel0 % CHUNK;
    if (part >= channels) return;
    const T* from = source + part + int64_t(row_step) * row0 + (q + column0) * column_step;
    T* to = ring + (int(threadIdx.x) - lane) * V + part + row0 * kRow;
#pragma unroll kUnroll
    for (int s = 0; s < kSteps; s++) {
      const int row = s * kPixels / CHUNK, column = s * kPixels % CHUNK;
      if (ROWS * CHUNK % kPixels && row + row0 >= ROWS) continue;
      const int at = q + column0 + column;
      const bool exists = at >= begin && at < end && (rows >> row0 & 1u << row);
#pragma unroll
      for (int i = 0; i < kOwn; i++) {
        copy_async<BYTES>(to + row * kRow + (at & (kSlots - 1)) * kColumn + i * kPiece,
                          from + uint64_t(row_step) * row + column * column_step + i * kPiece,
                          exists && (kOwn == 1 || part + i * kPiece < channels));
      }
    }
  }
};

}  // namespace vops
