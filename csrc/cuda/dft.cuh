// The discrete Fourier transform of N complex numbers in registers: everything is unrolled, roots of unity are
// constants.
#pragma once
#include "toolchain.h"

namespace vops {

// cos(2 pi k / n). Half a turn at most goes into the series, so its terms end before the digits of a double do.
__host__ __device__ constexpr double cosine(int k, int n) {
  k = k < 0 ? -k : k;
  const double x = 6.283185307179586476925286766559 * (2 * k > n ? n - k : k) / n;
  double term = 1, sum = 1;
  for (int i = 1; i < 20; i++) {
    term *= -x * x / ((2 * i - 1) * (2 * i));
    sum += term;
  }
  return sum;
}

// exp(-2 pi i k / N) for k < N.
template <int N>
struct Roots {
  float re[N], im[N];
  __host__ __device__ constexpr Roots() : re(), im() {
    for (int k = 0; k < N; k++) {
      re[k] = float(cosine(k, N));
      im[k] = float(-cosine(4 * k - N, 4 * N));
    }
  }
};

template <int P>
__device__ __forceinline__ void dft_of_power_of_two(float (&re)[P], float (&im)[P]) {
  if constexpr (P > 1) {
    constexpr Roots<P> root;
    constexpr int kHalf = P / 2;
    float even_re[kHalf], even_im[kHalf], odd_re[kHalf], odd_im[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; j++) {
      even_re[j] = re[2 * j];
      even_im[j] = im[2 * j];
      odd_re[j] = re[2 * j + 1];
      odd_im[j] = im[2 * j + 1];
    }
    dft_of_power_of_two(even_re, even_im);
    dft_of_power_of_two(odd_re, odd_im);
#pragma unroll
    for (int k = 0; k < kHalf; k++) {
      float turned_re = odd_re[k], turned_im = odd_im[k];
      if (4 * k == P) {  // by -i
        turned_re = odd_im[k];
        turned_im = -odd_re[k];
      } else if (k > 0) {
        turned_re = root.re[k] * odd_re[k] - root.im[k] * odd_im[k];
        turned_im = root.re[k] * odd_im[k] + root.im[k] * odd_re[k];
      }
      re[k] = even_re[k] + turned_re;
      im[k] = even_im[k] + turned_im;
      re[k + kHalf] = even_re[k] - turned_re;
      im[k + kHalf] = even_im[k] - turned_im;
    }
  }
}

// By the sums and differences of the inputs j and M - j, which halve the products.
template <int M>
__device__ __forceinline__ void dft_of_odd(float (&re)[M], float (&im)[M]) {
  if constexpr (M > 1) {
    constexpr Roots<M> root;
    constexpr int kHalf = M / 2;
    float sum_re[kHalf], sum_im[kHalf], difference_re[kHalf], difference_im[kHalf];
    const float first_re = re[0], first_im = im[0];
#pragma unroll
    for (int j = 0; j < kHalf; j++) {
      const int mirrored = M - 1 - j;
      sum_re[j] = re[j + 1] + re[mirrored];
      sum_im[j] = im[j + 1] + im[mirrored];
      difference_re[j] = re[j + 1] - re[mirrored];
      difference_im[j] = im[j + 1] - im[mirrored];
      re[0] += sum_re[j];
      im[0] += sum_im[j];
    }
#pragma unroll
    for (int k = 1; k <= kHalf; k++) {
      float even_re = first_re, even_im = first_im, odd_re = 0.f, odd_im = 0.f;
#pragma unroll
      for (int j = 0; j < kHalf; j++) {
        const int at = (j + 1) * k % M;
        even_re += root.re[at] * sum_re[j];
        even_im += root.re[at] * sum_im[j];
        odd_re -= root.im[at] * difference_im[j];
        odd_im += root.im[at] * difference_re[j];
      }
      re[k] = even_re + odd_re;
      im[k] = even_im + odd_im;
      re[M - k] = even_re - odd_re;
      im[M - k] = even_im - odd_im;
    }
  }
}

// In place. With re and im exchanged in the call it is the inverse, times N.
//
// N is a power of two P times an odd M. The input M a + P b and the output k meet with the root of a * k / P + b * k /
// M turns, so the transforms of the two lengths follow each other without factors in between.
template <int N>
__device__ __forceinline__ void dft(float (&re)[N], float (&im)[N]) {
  constexpr int P = N & -N, M = N / P;
  float part_re[P][M], part_im[P][M];
#pragma unroll
  for (int b = 0; b < M; b++) {
    float line_re[P], line_im[P];
#pragma unroll
    for (int a = 0; a < P; a++) {
      line_re[a] = re[(M * a + P * b) % N];
      line_im[a] = im[(M * a + P * b) % N];
    }
    dft_of_power_of_two(line_re, line_im);
#pragma unroll
    for (int a = 0; a < P; a++) {
      part_re[a][b] = line_re[a];
      part_im[a][b] = line_im[a];
    }
  }
#pragma unroll
  for (int a = 0; a < P; a++) dft_of_odd(part_re[a], part_im[a]);
#pragma unroll
  for (int k = 0; k < N; k++) {
    re[k] = part_re[k % P][k % M];
    im[k] = part_im[k % P][k % M];
  }
}

}  // namespace vops
