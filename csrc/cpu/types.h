// The types of numbers: storage types, which a tensor has at run time, and those of sums, double for double and float
// for all others. Kernels are compiled for each only where they read tensors themselves.
#pragma once
#include "tensor.h"
#include "vec.h"

namespace vops {
namespace VOPS_ISA {

template <class T>
struct SumTypeOf {
  typedef float type;
};
template <>
struct SumTypeOf<double> {
  typedef double type;
};
template <class T>
using SumOf = typename SumTypeOf<T>::type;

VOPS_INLINE int64_t size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

// Calls f(a number of the storage type).
template <class F>
VOPS_INLINE auto with_type(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32:
      return f(float());
    case kBFloat16:
      return f(bf16());
    case kFloat16:
      return f(f16());
    default:
      return f(double());
  }
}
// The same for a kernel that has sums of the type A already.
template <class A, class F>
VOPS_INLINE auto with_type_of_sums(int dtype, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    return f(double());
  } else {
    return dtype == kFloat32 ? f(float()) : dtype == kBFloat16 ? f(bf16()) : f(f16());
  }
}
// Calls f(a number of the type of the sums).
template <class F>
VOPS_INLINE auto with_sum_type(int dtype, const F& f) {
  return dtype == kFloat64 ? f(double()) : f(float());
}

}  // namespace VOPS_ISA
}  // namespace vops
