// What the kernels of every instruction set share; compiled once, for the baseline.
#pragma once
#include <cstddef>
#include <cstdint>

#include "channel_aggregation_ffn.h"
#include "cross_covariance.h"
#include "dwconv.h"
#include "dwconv_layer_norm.h"
#include "feature_decompose.h"
#include "gated_recursion.h"
#include "global_filter.h"
#include "layer_norm_2d.h"
#include "moga_gate.h"
#include "multi_order_dwconv.h"
#include "pointwise.h"
#include "shift_split_attention.h"
#include "split_cascade.h"

namespace vops {

// Memory of the calling thread, 64-byte aligned, valid until its next call for the same use; null when there is none
// left. It is kept and only grows, so that a kernel does not pay for fresh pages on every call. Sums are what the
// threads of one kernel share: they belong to the thread that called it.
enum Use { kPanels, kSums };
void* thread_scratch(Use use, size_t bytes);

extern const Error kOutOfMemory;

// Threads that wait, in one parallel region, for the passes of an op: they are woken once, not for every pass. Waking
// them takes up to 0.1 ms where OpenMP's threads sleep between regions (OMP_WAIT_POLICY=PASSIVE), as long as a pass.
// Calls lead(context) on this thread, while the others wait; they go when it returns.
void with_crew(void (*lead)(void*), void* context);
// Whether this thread leads a crew.
bool leads_crew();
// Runs share(context) on the threads of the crew that this thread leads, this one among them: on at least one.
void share_with_crew(void (*share)(void*), void* context);

// The ops, each with one table of functions per instruction set: <namespace>::<name>_ops.
#define VOPS_CPU_OPS(X)                                \
  X(ChannelAggregationFfnOps, channel_aggregation_ffn) \
  X(CrossCovarianceOps, cross_covariance)              \
  X(DwConvOps, dwconv)                                 \
  X(DwConvLayerNormOps, dwconv_layer_norm)             \
  X(FeatureDecomposeOps, feature_decompose)            \
  X(GatedRecursionOps, gated_recursion)                \
  X(GlobalFilterOps, global_filter)                    \
  X(LayerNorm2dOps, layer_norm_2d)                     \
  X(MogaGateOps, moga_gate)                            \
  X(MultiOrderDwConvOps, multi_order_dwconv)           \
  X(PointwiseOps, pointwise)                           \
  X(ShiftSplitAttentionOps, shift_split_attention)     \
  X(SplitCascadeOps, split_cascade)

struct CpuKernels {
  const char* isa;
#define VOPS_FIELD(type, name) const type* name;
  VOPS_CPU_OPS(VOPS_FIELD)
#undef VOPS_FIELD
};
// The best set for this processor; VISION_OPS_CPU_ISA=baseline|avx2|avx512, read once, may lower the choice.
const CpuKernels& cpu_kernels();

}  // namespace vops
