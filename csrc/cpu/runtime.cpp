#include "runtime.h"

#include <cstdlib>
#include <cstring>

namespace vops {

namespace baseline {
extern const DwConvOps dwconv_ops;
extern const GatedRecursionOps gated_recursion_ops;
extern const GlobalFilterOps global_filter_ops;
extern const LayerNorm2dOps layer_norm_2d_ops;
extern const MultiOrderDwConvOps multi_order_dwconv_ops;
extern const ShiftSplitAttentionOps shift_split_attention_ops;
}  // namespace baseline
#ifdef VOPS_X86
namespace avx2 {
extern const DwConvOps dwconv_ops;
extern const GatedRecursionOps gated_recursion_ops;
extern const GlobalFilterOps global_filter_ops;
extern const LayerNorm2dOps layer_norm_2d_ops;
extern const MultiOrderDwConvOps multi_order_dwconv_ops;
extern const ShiftSplitAttentionOps shift_split_attention_ops;
}  // namespace avx2
namespace avx512 {
extern const DwConvOps dwconv_ops;
extern const GatedRecursionOps gated_recursion_ops;
extern const GlobalFilterOps global_filter_ops;
extern const LayerNorm2dOps layer_norm_2d_ops;
extern const MultiOrderDwConvOps multi_order_dwconv_ops;
extern const ShiftSplitAttentionOps shift_split_attention_ops;
}  // namespace avx512
#endif

namespace {

constexpr size_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kExactScratch = true;  // so that the sanitizer sees where it ends
#else
constexpr bool kExactScratch = false;
#endif

void* allocate(size_t bytes) {
  return std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
}

struct ThreadScratch {
  void* data = nullptr;
  size_t size = 0;
  ~ThreadScratch() { std::free(data); }
};

const CpuKernels kKernels[] = {
    {"baseline", &baseline::dwconv_ops, &baseline::multi_order_dwconv_ops, &baseline::layer_norm_2d_ops,
     &baseline::gated_recursion_ops, &baseline::global_filter_ops, &baseline::shift_split_attention_ops},
#ifdef VOPS_X86
    {"avx2", &avx2::dwconv_ops, &avx2::multi_order_dwconv_ops, &avx2::layer_norm_2d_ops, &avx2::gated_recursion_ops,
     &avx2::global_filter_ops, &avx2::shift_split_attention_ops},
    {"avx512", &avx512::dwconv_ops, &avx512::multi_order_dwconv_ops, &avx512::layer_norm_2d_ops,
     &avx512::gated_recursion_ops, &avx512::global_filter_ops, &avx512::shift_split_attention_ops},
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
      if (!std::strcmp(name, kKernels[i].isa)) return i;
    }
  }
  return best;
}

}  // namespace

const Error kOutOfMemory = "out of memory";

void* thread_scratch(Use use, size_t bytes) {
  static thread_local ThreadScratch scratches[2];
  ThreadScratch& scratch = scratches[use];
  if (bytes > scratch.size || kExactScratch) {
    std::free(scratch.data);
    scratch.data = allocate(bytes);
    scratch.size = scratch.data ? bytes : 0;
  }
  return scratch.data;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& kernels = kKernels[chosen()];
  return kernels;
}

}  // namespace vops
