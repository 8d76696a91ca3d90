// Runs CUDA C++ kernels on the CPU, for tests: compile a .cu as C++ with -DVOPS_EMU. One fiber per CUDA thread, one
// block after another; __syncthreads and the warp collectives switch fibers. The environment variable VOPS_EMU_ORDER
// says in which order threads run, so that a missing barrier changes the result: 0 in order, 1 backwards, n shuffled
// with seed n. Not emulated: inline PTX, tensor cores, clusters, asynchronous copies (give these a plain version under
// VOPS_EMU), independent thread progress, races between blocks.
//
// Launches can be recorded in place of running, for the ledger (benchmarks/ledger): the host's part is real, and its
// tensors need no memory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <utility>
#include <vector>
#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define VOPS_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(emu::state().shared.data())
#define VOPS_COST(...) emu::state().cost = {__VA_ARGS__}
#define VOPS_LAUNCH(kernel, grid, block, smem, stream, ...) \
  emu::launch(emu::name<(kernel)>(), grid, block, smem, [=] { (kernel)(__VA_ARGS__); })

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using __half = _Float16;
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float f) {  // rounds to nearest even
    uint32_t u;
    std::memcpy(&u, &f, 4);
    bits = f != f ? uint16_t(u >> 16 | 64) : uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  }
};

namespace emu {

void entry();
#ifdef __x86_64__  // 9 ns a switch; swapcontext makes a system call each time (180 ns)
struct Context {
  void* stack_pointer;
};
__attribute__((naked, noinline)) inline void switch_context(Context*, Context*) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp,(%rdi); mov (%rsi),%rsp\n"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
inline void make_context(Context* c, char* stack, size_t size) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + size) & ~uintptr_t(15)) - 1;
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  c->stack_pointer = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* c, char* stack, size_t size) {
  getcontext(c);
  c->uc_stack.ss_sp = stack;
  c->uc_stack.ss_size = size;
  c->uc_link = nullptr;
  makecontext(c, entry, 0);
}
#endif

struct Fiber {
  Context context;
  dim3 thread;
  bool done;
};
struct Warp {
  unsigned arrived, generation;
  uint64_t slot[32];
};
struct Cost {
  int64_t bytes_read, bytes_written, multiply_adds;
};
struct Launch {
  const char* kernel;
  dim3 grid;
  unsigned threads;
  size_t shared;
  Cost cost;
};
struct State {
  bool recording;
  std::vector<Launch> recorded;
  Cost cost;  // of the next launch
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks, shared;
  std::function<void()> body;
  dim3 grid, block, block_index;
  int running, live, arrived;     // fiber, fibers not finished, fibers that wait at __syncthreads
  unsigned generation, progress;  // completed block barriers; completed rendezvous of any kind
  int error;
};
inline State& state() {
  static State s = {};
  return s;
}
inline Fiber& current() { return state().fibers[state().running]; }
inline void yield() { switch_context(&current().context, &state().scheduler); }
inline void release_barrier() {
  State& s = state();
  if (s.arrived != s.live) return;
  s.arrived = 0;
  s.generation++;
  s.progress++;
}
inline void entry() {
  State& s = state();
  s.body();
  current().done = true;
  s.live--;
  s.progress++;
  if (s.arrived) release_barrier();
  yield();
}

inline std::vector<int> thread_order(size_t threads) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  const char* wanted = std::getenv("VOPS_EMU_ORDER");
  const int mode = wanted ? std::atoi(wanted) : 0;
  if (mode == 1) std::reverse(order.begin(), order.end());
  if (mode > 1) std::shuffle(order.begin(), order.end(), std::mt19937(mode));
  return order;
}

constexpr int kInvalidConfiguration = 9;

// The compiler's own text, in which the kernel stands with its template arguments.
template <auto kernel>
const char* name() {
  return __PRETTY_FUNCTION__;
}

inline void launch(const char* kernel, dim3 grid, dim3 block, size_t shared, std::function<void()> body) {
  State& s = state();
  const size_t threads = size_t(block.x) * block.y * block.z, stack = 128 << 10;
  const bool legal = grid.x && grid.x <= INT32_MAX && grid.y && grid.y <= 65535 && grid.z && grid.z <= 65535;
  if (!legal || !threads || threads > 1024 || shared > 227 << 10) {
    s.error = kInvalidConfiguration;
    return;
  }
  const Cost cost = std::exchange(s.cost, Cost{});
  if (s.recording) {
    s.recorded.push_back({kernel, grid, unsigned(threads), shared, cost});
    return;
  }
  s.grid = grid;
  s.block = block;
  s.body = std::move(body);
  s.fibers.resize(threads);
  s.stacks.resize(threads * stack);
  s.shared = std::vector<char>(shared);  // of exactly this size, for the address sanitizer
  const std::vector<int> order = thread_order(threads);
  for (size_t b = 0; b < size_t(grid.x) * grid.y * grid.z; b++) {
    s.block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    s.live = int(threads);
    s.arrived = 0;
    s.warps.assign((threads + 31) / 32, Warp{});
    std::fill(s.shared.begin(), s.shared.end(), char(0xff));  // NaN, so that a read of unwritten shared memory shows
    for (size_t i = 0; i < threads; i++) {
      Fiber& f = s.fibers[i];
      f.done = false;
      f.thread = dim3(unsigned(i % block.x), unsigned(i / block.x % block.y), unsigned(i / block.x / block.y));
      make_context(&f.context, &s.stacks[i * stack], stack);
    }
    while (s.live) {
      const unsigned before = s.progress;
      for (int i : order) {
        if (s.fibers[i].done) continue;
        s.running = i;
        switch_context(&s.scheduler, &s.fibers[i].context);
      }
      if (s.progress == before) {
        std::fprintf(stderr, "cuda_emu: deadlock in block %zu\n", b);
        std::abort();
      }
    }
  }
}

inline void warp_barrier(unsigned mask) {
  State& s = state();
  Warp& w = s.warps[s.running / 32];
  const size_t lanes = s.fibers.size() - s.running / 32 * 32;
  if (lanes < 32) mask &= (1u << lanes) - 1;
  const unsigned generation = w.generation;
  w.arrived |= 1u << s.running % 32;
  if (w.arrived == mask) {
    w.arrived = 0;
    w.generation++;
    s.progress++;
  }
  while (w.generation == generation) yield();
}
template <class T>
T exchange(unsigned mask, T value, int from) {
  State& s = state();
  Warp& w = s.warps[s.running / 32];
  std::memcpy(&w.slot[s.running % 32], &value, sizeof value);
  warp_barrier(mask);
  if (from >= 0 && from < 32 && (mask >> from & 1) && from < int(s.fibers.size()) - s.running / 32 * 32)
    std::memcpy(&value, &w.slot[from], sizeof value);
  warp_barrier(mask);
  return value;
}
inline int lane() { return state().running % 32; }
// A call's failure is kept for cudaGetLastError, as by the runtime.
inline int failed(int error) { return state().error = error; }

}  // namespace emu

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaGetLastError() { return std::exchange(emu::state().error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == emu::kInvalidConfiguration ? "invalid configuration argument" : "invalid device ordinal";
}
// One device, 0.
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : emu::failed(101); }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : emu::failed(emu::kInvalidConfiguration);
}

#define threadIdx (emu::current().thread)
#define blockIdx (emu::state().block_index)
#define blockDim (emu::state().block)
#define gridDim (emu::state().grid)
inline void __syncthreads() {
  emu::State& s = emu::state();
  const unsigned generation = s.generation;
  s.arrived++;
  emu::release_barrier();
  while (s.generation == generation) emu::yield();
}
inline void __syncwarp(unsigned mask = ~0u) { emu::warp_barrier(mask); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emu::exchange(mask, value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emu::exchange(mask, value, emu::lane() ^ lane_mask);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return emu::exchange(mask, value, emu::lane() + int(delta));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  return emu::exchange(mask, value, emu::lane() - int(delta));
}
using std::max;
using std::min;
