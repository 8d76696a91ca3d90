#include "runtime.h"

#include <cstdlib>
#include <cstring>

namespace vops {

#define VOPS_DECLARE(type, name) extern const type name##_ops;
#define VOPS_POINTER(type, name) &name##_ops,
#define VOPS_INSTRUCTION_SET(isa)                                \
  namespace isa {                                                \
  VOPS_CPU_OPS(VOPS_DECLARE)                                     \
  const CpuKernels kernels = {#isa, VOPS_CPU_OPS(VOPS_POINTER)}; \
  }
VOPS_INSTRUCTION_SET(baseline)
#ifdef VOPS_X86
VOPS_INSTRUCTION_SET(avx2)
VOPS_INSTRUCTION_SET(avx512)
#endif

namespace {

constexpr size_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExactScratch = true;  // so that the sanitizer sees where it ends
#else
constexpr bool kExactScratch = false;
#endif

void* allocate(size_t bytes) {
  return std::aligned_alloc(kAlignment, ((bytes ? bytes : 1) + kAlignment - 1) / kAlignment * kAlignment);
}

struct ThreadScratch {
  void* data = nullptr;
  size_t size = 0;
  ~ThreadScratch() { std::free(data); }
};

const CpuKernels* const kKernels[] = {&baseline::kernels,
#ifdef VOPS_X86
                                      &avx2::kernels, &avx512::kernels
#endif
};

int best_supported() {
#ifdef VOPS_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("f16c")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512cd");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

int chosen() {
  const int best = best_supported();
  if (const char* name = std::getenv("VISION_OPS_CPU_ISA")) {
    for (int i = 0; i < best; i++) {
      if (!std::strcmp(name, kKernels[i]->isa)) return i;
    }
  }
  return best;
}

}  // namespace

const Error kOutOfMemory = "out of memory";

void* thread_scratch(Use use, size_t bytes) {
  static thread_local ThreadScratch scratches[2];
  ThreadScratch& scratch = scratches[use];
  if (!scratch.data || bytes > scratch.size || kExactScratch) {
    std::free(scratch.data);
    scratch.data = allocate(bytes);
    scratch.size = scratch.data ? bytes : 0;
  }
  return scratch.data;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = *kKernels[chosen()];
  return kernels;
}

}  // namespace vops
