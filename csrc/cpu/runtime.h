// What the kernels of every instruction set share; compiled once, for the baseline.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dwconv.h"
#include "gated_recursion.h"
#include "global_filter.h"
#include "layer_norm_2d.h"
#include "multi_order_dwconv.h"
#include "shift_split_attention.h"

namespace vops {

// Memory of the calling thread, 64-byte aligned, valid until its next call for the same use; null when there is none
// left. It is kept and only grows, so that a kernel does not pay for fresh pages on every call. Sums are what the
// threads of one kernel share: they belong to the thread that called it.
enum Use { kPanels, kSums };
void* thread_scratch(Use use, size_t bytes);

extern const Error kOutOfMemory;

struct CpuKernels {
  const char* isa;
  const DwConvOps* dwconv;
  const MultiOrderDwConvOps* multi_order_dwconv;
  const LayerNorm2dOps* layer_norm_2d;
  const GatedRecursionOps* gated_recursion;
  const GlobalFilterOps* global_filter;
  const ShiftSplitAttentionOps* shift_split_attention;
};
// The best set for this processor; VISION_OPS_CPU_ISA=baseline|avx2|avx512, read once, may lower the choice.
const CpuKernels& cpu_kernels();

}  // namespace vops
