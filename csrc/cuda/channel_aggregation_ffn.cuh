// What the kernels of the channel aggregation share.
#pragma once
#include "channel_aggregation_ffn_cuda.h"
#include "march3x3.cuh"

namespace vops {
namespace {

constexpr int kResident = 4;  // blocks of an SM, of all of them

inline Walk walk_of(const Tensor4& f) {
  return f.dtype == kFloat32 ? cut_walk<float>(f, kResident) : cut_walk<__half>(f, kResident);
}

// Bytes of a copy of the tensor's columns.
template <class T>
int piece_of(const Tensor4& t, const Walk& g) {
  return piece_bytes(t.data, t.stride[0], t.stride[2], t.stride[3], t.size[1], sizeof(T), 4 << g.lane_bits);
}
template <class T>
bool whole_words(const Tensor4& t) {
  return piece_bytes(t.data, t.stride[0], t.stride[2], t.stride[3], t.size[1], sizeof(T), 4) == 4;
}

// The rows of the workspace of the backward pass: where the sums of a share begin, and how many there are.
struct SumsOfShare {
  __host__ __device__ explicit SumsOfShare(int64_t channels)
      : bias(9 * channels),
        df(10 * channels),
        decompose(11 * channels),
        decompose_bias(12 * channels),
        count(12 * channels + 1) {}
  int64_t bias, df, decompose, decompose_bias, count;
};

}  // namespace
}  // namespace vops
