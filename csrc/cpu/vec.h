// One vector of channels in the instruction set of this translation unit, and the conversions of the storage types.
// Everything lives in a namespace named after the instruction set and uses no std:: templates, so that the linker can
// never merge an inline function of one instruction set into another.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define VOPS_INLINE static inline __attribute__((always_inline))

namespace vops {
namespace VOPS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

typedef float Float __attribute__((vector_size(kLanes * 4)));
typedef double Double __attribute__((vector_size(kLanes * 8)));
typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UInt __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Half __attribute__((vector_size(kLanes * 2)));

template <class A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef Float type;
};
template <>
struct VecOf<double> {
  typedef Double type;
};
template <class A>
using Vec = typename VecOf<A>::type;

VOPS_INLINE Float splat(float s) { return Float{} + s; }

template <class V, class T>
VOPS_INLINE V load_bits(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
VOPS_INLINE Float load(const float* p) { return load_bits<Float>(p); }
VOPS_INLINE Double load(const double* p) { return load_bits<Double>(p); }
VOPS_INLINE void store(float* p, Float v) { memcpy(p, &v, sizeof v); }
VOPS_INLINE void store(double* p, Double v) { memcpy(p, &v, sizeof v); }

VOPS_INLINE Float load(const bf16* p) { return (Float)(__builtin_convertvector(load_bits<Half>(p), UInt) << 16); }
VOPS_INLINE void store(bf16* p, Float v) {
  const UInt u = (UInt)v;
  UInt rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  rounded = v == v ? rounded : (u >> 16) | 0x40u;
  Half h = __builtin_convertvector(rounded, Half);
  memcpy(p, &h, sizeof h);
}

// The maskz forms: gcc 12 warns of the undefined pass-through of the plain ones.
#if defined(__AVX512F__)
VOPS_INLINE Float load(const f16* p) { return (Float)_mm512_maskz_cvtph_ps(0xffff, load_bits<__m256i>(p)); }
VOPS_INLINE void store(f16* p, Float v) {
  __m256i h = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
}
#elif defined(__AVX2__)
VOPS_INLINE Float load(const f16* p) { return (Float)_mm256_cvtph_ps(load_bits<__m128i>(p)); }
VOPS_INLINE void store(f16* p, Float v) {
  __m128i h = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  memcpy(p, &h, sizeof h);
}
#else
VOPS_INLINE Float load(const f16* p) {
  const UInt h = __builtin_convertvector(load_bits<Half>(p), UInt);
  const UInt magnitude = (h & 0x7fffu) << 13;
  // The multiplication moves the exponent from half's bias to float's and normalises half's subnormals on the way.
  const UInt finite = (UInt)((Float)magnitude * splat(0x1p112f));
  const UInt special = (UInt)(magnitude >= 0x0f800000u);
  return (Float)((finite & ~special) | ((magnitude | 0x7f800000u) & special) | ((h & 0x8000u) << 16));
}
VOPS_INLINE void store(f16* p, Float v) {
  const UInt bits = (UInt)v;
  const UInt u = bits & 0x7fffffffu;
  const UInt normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const UInt subnormal =
      (UInt)((Float)u + splat(0.5f)) - 0x3f000000u;  // the addition rounds at half's last subnormal bit
  const UInt is_subnormal = (UInt)(u < 0x38800000u), overflows = (UInt)(u >= 0x47800000u),
             nan = (UInt)(u > 0x7f800000u);
  UInt h = (subnormal & is_subnormal) | (normal & ~is_subnormal);
  h = (h & ~overflows) | (0x7c00u & overflows) | (0x200u & nan);
  const Half out = __builtin_convertvector(h | ((bits >> 16) & 0x8000u), Half);
  memcpy(p, &out, sizeof out);
}
#endif

// The first n < kLanes elements.
#if defined(__AVX512F__)
VOPS_INLINE Float load_n(const float* p, int n) { return (Float)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
VOPS_INLINE void store_n(float* p, Float v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v); }
template <class T>
VOPS_INLINE Float load_n(const T* p, int n) {
  T t[kLanes];
  const __m256i v = _mm256_maskz_loadu_epi16((1u << n) - 1, p);
  memcpy(t, &v, sizeof v);
  return load(t);
}
template <class T>
VOPS_INLINE void store_n(T* p, Float v, int n) {
  T t[kLanes];
  store(t, v);
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, load_bits<__m256i>(t));
}
#else
// In pieces of constant size: a memcpy of variable size would be a call.
template <class T>
VOPS_INLINE void copy_n(T* dst, const T* src, int n) {
  if (kLanes > 4 && (n & 4)) {
    memcpy(dst, src, 4 * sizeof(T));
    dst += 4, src += 4;
  }
  if (n & 2) {
    memcpy(dst, src, 2 * sizeof(T));
    dst += 2, src += 2;
  }
  if (n & 1) memcpy(dst, src, sizeof(T));
}
template <class T>
VOPS_INLINE Float load_n(const T* p, int n) {
  T t[kLanes];
  memset(t, 0, sizeof t);
  copy_n(t, p, n);
  return load(t);
}
template <class T>
VOPS_INLINE void store_n(T* p, Float v, int n) {
  T t[kLanes];
  store(t, v);
  copy_n(p, t, n);
}
#ifdef __AVX2__
// The pieces above would have to reach memory before the vector could be read. The stores have no such wait.
VOPS_INLINE Float load_n(const float* p, int n) {
  alignas(32) static constexpr int kMask[2 * kLanes] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return (Float)_mm256_maskload_ps(p, _mm256_loadu_si256((const __m256i*)(kMask + kLanes - n)));
}
#endif
#endif

// float64 is there for exactness, not for speed.
VOPS_INLINE Double load_n(const double* p, int n) {
  Double v = {};
  for (int k = 0; k < n; k++) v[k] = p[k];
  return v;
}
VOPS_INLINE void store_n(double* p, Double v, int n) {
  for (int k = 0; k < n; k++) p[k] = v[k];
}

#if defined(__clang__)
#define VOPS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VOPS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Int{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
VOPS_INLINE Float interleave_low(Float a, Float b) {
  return VOPS_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
VOPS_INLINE Float interleave_high(Float a, Float b) {
  return VOPS_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
VOPS_INLINE Float interleave_low(Float a, Float b) { return VOPS_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
VOPS_INLINE Float interleave_high(Float a, Float b) { return VOPS_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
VOPS_INLINE Float interleave_low(Float a, Float b) { return VOPS_SHUFFLE(a, b, 0, 4, 1, 5); }
VOPS_INLINE Float interleave_high(Float a, Float b) { return VOPS_SHUFFLE(a, b, 2, 6, 3, 7); }
#endif

// kLanes x kLanes, in place: log2(kLanes) perfect shuffles of the rows.
VOPS_INLINE void transpose(Float (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    Float t[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; i++) {
      t[2 * i] = interleave_low(v[i], v[i + kLanes / 2]);
      t[2 * i + 1] = interleave_high(v[i], v[i + kLanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; i++) v[i] = t[i];
  }
}

// Lane i of the result is the sum of v[i]: every step adds the halves of two vectors and shuffles them into one.
VOPS_INLINE Float lane_sums(Float (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < step; i++) v[i] = interleave_low(v[i], v[i + step]) + interleave_high(v[i], v[i + step]);
  }
  return v[0];
}
VOPS_INLINE Double lane_sums(Double (&v)[kLanes]) {
  Double sums = {};
  for (int i = 0; i < kLanes; i++) {
    for (int k = 0; k < kLanes; k++) sums[i] += v[i][k];
  }
  return sums;
}

VOPS_INLINE Float inverse_sqrt(Float v) {
  for (int k = 0; k < kLanes; k++) v[k] = 1.f / sqrtf(v[k]);
  return v;
}
VOPS_INLINE Double inverse_sqrt(Double v) {
  for (int k = 0; k < kLanes; k++) v[k] = 1. / sqrt(v[k]);
  return v;
}

// x = n * log(2) + r; returns exp(r), at 3e-9, and n.
VOPS_INLINE Float exp_reduced(Float x, Int& n) {
  const Float shift = splat(0x1.8p23f);  // adding it rounds to an integer
  const Float k = (x * 1.44269504089f + shift) - shift;
  const Float r = (x - k * 0x1.62e400p-1f) - k * 0x1.7f7d1cp-20f;
  n = __builtin_convertvector(k == k ? k : splat(0.f), Int);
  Float p = splat(0.0013946457765996456f);
  p = p * r + 0.008369158953428268f;
  p = p * r + 0.04166626185178757f;
  p = p * r + 0.16666516661643982f;
  p = p * r + .5f;
  return p * r * r + r + 1.f;
}
VOPS_INLINE Float exp(Float x) {
  x = x < -104.f ? splat(-104.f) : x;
  x = x > 89.f ? splat(89.f) : x;
  Int n;
  const Float p = exp_reduced(x, n);
  // 2^n in two factors: n runs from -150 to 129, past the exponents of normal numbers.
  const Int half = n >> 1;
  return p * (Float)((half + 127) << 23) * (Float)((n - half + 127) << 23);
}
// Of numbers that are at most about 0. Below -87 it is that of -87: next to a 1, nothing.
VOPS_INLINE Float exp_of_negative(Float x) {
  x = x < -87.f ? splat(-87.f) : x;
  Int n;
  const Float p = exp_reduced(x, n);
  return p * (Float)((n + 127) << 23);
}

// The normal distribution function. -log(erfc(a)) = a * q(a), q fitted on [0, 6.5]; erfc(6.5) is 4e-20.
VOPS_INLINE Float normal_cdf(Float x) {
  const Float magnitude = (x < 0.f ? -x : x) * 0.70710678118f;
  const Float a = magnitude > 6.5f ? splat(6.5f) : magnitude;
  Float q = splat(-3.639074319661262e-10f);
  q = q * a + 1.6932828472704387e-08f;
  q = q * a - 3.544128617249953e-07f;
  q = q * a + 4.405301297083497e-06f;
  q = q * a - 3.6080953577766195e-05f;
  q = q * a + 0.0002029835304711014f;
  q = q * a - 0.0007776786223985255f;
  q = q * a + 0.0017812824808061123f;
  q = q * a - 0.00015874441305641085f;
  q = q * a - 0.019223013892769814f;
  q = q * a + 0.102824367582798f;
  q = q * a + 0.636608362197876f;
  q = q * a + 1.1283799409866333f;
  Int n;
  Float tail = exp_reduced(-(a * q), n);
  tail *= (Float)((n + 126) << 23);  // half of 2^n: n is -64 at least
  tail = magnitude < 6.5f ? tail : splat(0.f);
  return x < 0.f ? tail : 1.f - tail;
}

VOPS_INLINE Float gelu(Float x) { return x * normal_cdf(x); }
VOPS_INLINE Float gelu_grad(Float x) { return normal_cdf(x) + x * exp(x * x * -.5f) * 0.39894228040f; }
VOPS_INLINE Float silu(Float x) { return x / (1.f + exp(-x)); }
VOPS_INLINE Float silu_grad(Float x) {
  const Float s = 1.f / (1.f + exp(-x));
  return s * (1.f + x * (1.f - s));
}
VOPS_INLINE double gelu(double x) { return x * (0.5 * ::erfc(-x * 0.70710678118654752440)); }
VOPS_INLINE double gelu_grad(double x) {
  return 0.5 * ::erfc(-x * 0.70710678118654752440) + x * ::exp(-.5 * x * x) * 0.39894228040143267794;
}
VOPS_INLINE double silu(double x) { return x / (1. + ::exp(-x)); }
VOPS_INLINE double silu_grad(double x) {
  const double s = 1. / (1. + ::exp(-x));
  return s * (1. + x * (1. - s));
}
// libm has no vectors. Not inlined: these are long, and float64 is not there for speed.
#define VOPS_BY_LANE(name, of_lane)                                                        \
  __attribute__((noinline, unused)) static Double name(Double x) {                         \
    _Pragma("GCC unroll 1") for (int k = 0; k < kLanes; k++) x[k] = of_lane((double)x[k]); \
    return x;                                                                              \
  }
VOPS_BY_LANE(exp, ::exp)
VOPS_BY_LANE(exp_of_negative, ::exp)
VOPS_BY_LANE(gelu, gelu)
VOPS_BY_LANE(gelu_grad, gelu_grad)
VOPS_BY_LANE(silu, silu)
VOPS_BY_LANE(silu_grad, silu_grad)
#undef VOPS_BY_LANE

// In halves, a third of the time of one lane after the other.
template <class A>
VOPS_INLINE A sum_of_lanes(Vec<A> v) {
  if constexpr (sizeof(A) == sizeof(float)) {
#pragma GCC unroll 4
    for (int step = kLanes; step > 1; step /= 2) v = interleave_low(v, v) + interleave_high(v, v);
    return v[0];
  }
  A sum = 0;
  for (int k = 0; k < kLanes; k++) sum += v[k];
  return sum;
}
template <class A>
VOPS_INLINE A largest_lane(Vec<A> v) {
  A lanes[kLanes], most;
  store(lanes, v);
  most = lanes[0];
  for (int k = 1; k < kLanes; k++) most = lanes[k] > most ? lanes[k] : most;
  return most;
}

// A number or a flag that a type carries.
template <auto number>
struct Constant {
  static constexpr auto value = number;
};

// Calls f(offset, load, store) for the vectors of [begin, end); the last one may be ragged.
template <class F>
VOPS_INLINE void for_each_vector(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    f(i, [](const auto* p) { return load(p); }, [](auto* p, auto v) { store(p, v); });
  }
  const int n = (int)(end - i);
  if (n > 0) {
    f(i, [n](const auto* p) { return load_n(p, n); }, [n](auto* p, auto v) { store_n(p, v, n); });
  }
}
template <class F>
VOPS_INLINE void for_each_vector(int64_t length, const F& f) {
  for_each_vector(0, length, f);
}

}  // namespace VOPS_ISA
}  // namespace vops
