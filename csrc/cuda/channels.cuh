// V neighbouring channels of one pixel: moved between global memory, shared memory and fp32 registers.
#pragma once
#include <cstring>
#include <type_traits>

#include "toolchain.h"

namespace vops {

template <class To, class From>
__device__ __forceinline__ To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// In memory, and in registers. Words, not T, so that the compiler moves the vector in one access; a single 2-byte value
// is held zero-extended, which spares the byte permutes of 16-bit register halves.
template <class T, int V>
struct alignas(sizeof(T) * V) StoredChannels {
  using Word = std::conditional_t<sizeof(T) * V == 2, uint16_t, uint32_t>;
  static constexpr int kWords = sizeof(T) * V / sizeof(Word);
  Word word[kWords];
};
template <class T, int V>
struct Channels {
  uint32_t word[StoredChannels<T, V>::kWords];
};

template <class T, int V>
__device__ __forceinline__ Channels<T, V> load(const T* p) {
  const StoredChannels<T, V> stored = *reinterpret_cast<const StoredChannels<T, V>*>(p);
  Channels<T, V> c;
#pragma unroll
  for (int i = 0; i < StoredChannels<T, V>::kWords; i++) c.word[i] = stored.word[i];
  return c;
}

template <class T, int V>
__device__ __forceinline__ float channel(const Channels<T, V>& c, int v) {
  if constexpr (sizeof(T) == 4) {
    return bit_copy<float>(c.word[v]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // fp32 with the low half cut off: one shift or mask
    return bit_copy<float>(v % 2 ? c.word[v / 2] & 0xffff0000u : c.word[v / 2] << 16);
  } else {
    return static_cast<float>(bit_copy<T>(static_cast<uint16_t>(c.word[v / 2] >> (v % 2 * 16))));
  }
}

template <class T>
__device__ __forceinline__ uint32_t to_bits(float f) {
  return bit_copy<uint16_t>(static_cast<T>(f));
}
template <class T>
__device__ __forceinline__ uint32_t to_bits(float low, float high) {
#ifndef VOPS_EMU
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return bit_copy<uint32_t>(__floats2bfloat162_rn(low, high));  // one F2FP
  } else {
    return bit_copy<uint32_t>(__floats2half2_rn(low, high));
  }
#else
  return to_bits<T>(low) | to_bits<T>(high) << 16;
#endif
}

// A predicated store, not a branch: left to itself nvcc jumps around every row of a column.
template <class T, int V>
__device__ __forceinline__ void store_if(bool wanted, T* p, const float (&f)[V]) {
  static_assert(V <= 2, "two words at most");
  constexpr int kWords = sizeof(T) * V / 4;
  uint32_t word[kWords ? kWords : 1];
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int v = 0; v < V; v++) word[v] = bit_copy<uint32_t>(f[v]);
  } else if constexpr (V == 1) {
    word[0] = to_bits<T>(f[0]);
  } else {
    word[0] = to_bits<T>(f[0], f[1]);
  }
#ifdef VOPS_EMU
  if (wanted) memcpy(__builtin_assume_aligned(p, sizeof(T) * V), word, sizeof(T) * V);
#else
#define VOPS_STORE(type, ...)                                                         \
  asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.global." type ";}"         \
               :                                                                      \
               : "r"(uint32_t(wanted)), "l"(__cvta_generic_to_global(p)), __VA_ARGS__ \
               : "memory")
  if constexpr (kWords == 0) VOPS_STORE("u16 [%1], %2", "h"(static_cast<uint16_t>(word[0])));
  if constexpr (kWords == 1) VOPS_STORE("u32 [%1], %2", "r"(word[0]));
  if constexpr (kWords == 2) VOPS_STORE("v2.u32 [%1], {%2, %3}", "r"(word[0]), "r"(word[1]));
#undef VOPS_STORE
#endif
}

// Parameters and their gradients may have another dtype than the activations: a switch, which all threads take alike.
template <class A>
__device__ __forceinline__ A load_scalar(const void* p, int dtype, int64_t i) {
  switch (dtype) {
    case kFloat32:
      return static_cast<A>(static_cast<const float*>(p)[i]);
    case kBFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const __nv_bfloat16*>(p)[i]));
    case kFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const __half*>(p)[i]));
    default:
      return static_cast<A>(static_cast<const double*>(p)[i]);
  }
}
template <class A>
__device__ __forceinline__ void store_scalar(void* p, int dtype, int64_t i, A value) {
  switch (dtype) {
    case kFloat32:
      static_cast<float*>(p)[i] = static_cast<float>(value);
      break;
    case kBFloat16:
      static_cast<__nv_bfloat16*>(p)[i] = static_cast<__nv_bfloat16>(static_cast<float>(value));
      break;
    case kFloat16:
      static_cast<__half*>(p)[i] = static_cast<__half>(static_cast<float>(value));
      break;
    default:
      static_cast<double*>(p)[i] = static_cast<double>(value);
  }
}

// The same number, of which the compiler knows nothing: what follows from it is not computed ahead of a loop, to occupy
// registers throughout.
__device__ __forceinline__ int opaque(int i) {
#ifndef VOPS_EMU
  asm volatile("" : "+r"(i));
#endif
  return i;
}

// Copies BYTES from global to shared memory, or zeros where !exists; 4 bytes and more without passing registers.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
#ifndef VOPS_EMU
  if constexpr (BYTES >= 4) {  // .ca: neighbouring strips meet their halo in L1
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "n"(BYTES), "r"(exists ? BYTES : 0)
                 : "memory");
    return;
  }
#endif
  if (exists) {
    memcpy(__builtin_assume_aligned(to, BYTES), __builtin_assume_aligned(from, BYTES), BYTES);
  } else {
    memset(to, 0, BYTES);
  }
}
__device__ __forceinline__ void copy_commit() {
#ifndef VOPS_EMU
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
__device__ __forceinline__ void copy_wait() {  // until this thread's copies have landed
#ifndef VOPS_EMU
  asm volatile("cp.async.wait_group 0;" : : : "memory");
#endif
}

}  // namespace vops
