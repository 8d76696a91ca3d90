// What the kernels of every instruction set share; compiled once, for the baseline.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tensor.h"

namespace vops {

// Memory of the calling thread, 64-byte aligned, valid until its next call for the same use; null when there is none
// left. It is kept and only grows, so that a kernel does not pay for fresh pages on every call. Sums and coefficients
// are what the threads of one kernel share: they belong to the thread that called it.
enum Use { kPanels, kSums, kCoefficients };
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

// The threads that PyTorch allows this one.
int64_t max_threads();

// Runs body(context, task, scratch of this thread) for every task, on all threads when `work` multiply-adds are worth
// it.
Error run_tasks(int64_t tasks, int64_t work, size_t scratch_bytes, void (*body)(const void*, int64_t, void*),
                const void* context);

}  // namespace vops
