// Small matrix products in registers, for heads of attention: too small for a GEMM library to be fast.
#pragma once
#include "panel.h"

namespace vops {
namespace VOPS_ISA {

// A product in registers has 4 or kMostRows rows and kMostColumns vectors at most.
constexpr int kMostRows = kLanes == 16 ? 8 : 4, kMostColumns = kLanes >= 8 ? 3 : 2;

// sum[r][j] += a[r * a_row + k * a_step] * (vector j of b at k), over k.
template <class A, int rows, int columns>
VOPS_INLINE void multiply_add(Vec<A> (&sum)[rows][columns], const A* a, int64_t a_row, int64_t a_step, const A* b,
                              int64_t b_step, int64_t b_block, int64_t count) {
  for (int64_t k = 0; k < count; k++, a += a_step, b += b_step) {
    Vec<A> v[columns];
#pragma GCC unroll 4
    for (int j = 0; j < columns; j++) v[j] = load(b + j * b_block);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
      for (int j = 0; j < columns; j++) sum[r][j] += v[j] * a[r * a_row];
    }
  }
}

// Calls f(rows, columns, first row, first column) for the products that make up a matrix of rows x vectors.
template <class A, class F>
VOPS_INLINE void for_each_product(int64_t rows, int64_t vectors, const F& f) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t columns = sizeof(A) == sizeof(double) ? 1 : min64(vectors - j, kMostColumns);
    for (int64_t r = 0; r < rows;) {
      const bool many = sizeof(A) == sizeof(float) && kMostRows == 8 && rows - r > 4;
      if constexpr (sizeof(A) == sizeof(double)) {
        f(Constant<4>(), Constant<1>(), r, j);
      } else if (many) {
        if (columns == 1) f(Constant<kMostRows>(), Constant<1>(), r, j);
        if (columns == 2) f(Constant<kMostRows>(), Constant<2>(), r, j);
        if (columns == 3) f(Constant<kMostRows>(), Constant<kMostColumns>(), r, j);
      } else {
        if (columns == 1) f(Constant<4>(), Constant<1>(), r, j);
        if (columns == 2) f(Constant<4>(), Constant<2>(), r, j);
        if (columns == 3) f(Constant<4>(), Constant<kMostColumns>(), r, j);
      }
      r += many ? 8 : 4;
    }
    j += columns;
  }
}
VOPS_INLINE int64_t whole_rows(int64_t channels) { return ceil_div(channels, 4) * 4; }

}  // namespace VOPS_ISA
}  // namespace vops
