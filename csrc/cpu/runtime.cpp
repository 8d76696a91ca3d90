#include "runtime.h"

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdlib>

namespace vops {

namespace {

constexpr size_t kAlignment = 64;

// Waking the other threads costs about as much as this many multiply-adds on one.
constexpr int64_t kSerialWork = 1 << 19;
// The same for a crew, which is awake.
constexpr int64_t kCrewWork = 1 << 15;

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

// What a leader shares with its crew. Every pass has a turn, an odd number; even ones lie between passes. A thread that
// wakes late misses turns: nobody waits for it.
struct Crew {
  alignas(64) std::atomic<uint32_t> turn{0};
  alignas(64) std::atomic<uint32_t> inside{0};  // how many threads may be running the share of this turn
  std::atomic<bool> over{false};
  void (*share)(void*);
  void* context;
};
thread_local Crew* led_crew = nullptr;

// Between passes there are microseconds; a leader that takes longer shall not cost others their processors.
class Wait {
 public:
  void operator()() {
    if (++count_ > kSpins) {
      sched_yield();
    } else {
#ifdef VOPS_X86
      __builtin_ia32_pause();
#endif
    }
  }

 private:
  static constexpr int kSpins = 1000;
  int count_ = 0;
};

void follow(Crew& crew) {
  uint32_t done = 0;
  Wait wait;
  while (!crew.over.load(std::memory_order_acquire)) {
    const uint32_t turn = crew.turn.load();
    if (turn % 2 == 0 || turn == done) {
      wait();
      continue;
    }
    // The leader ends the turn and then waits until nobody is inside: either it sees this thread, or this thread that
    // the turn is over.
    crew.inside.fetch_add(1);
    if (crew.turn.load() == turn) crew.share(crew.context);
    crew.inside.fetch_sub(1);
    done = turn;
    wait = Wait();
  }
}

}  // namespace

bool leads_crew() { return led_crew != nullptr; }

void share_with_crew(void (*share)(void*), void* context) {
  Crew& crew = *led_crew;
  crew.share = share;
  crew.context = context;
  crew.turn.fetch_add(1);
  share(context);
  crew.turn.fetch_add(1);
  for (Wait wait; crew.inside.load() != 0;) wait();
}

void with_crew(void (*lead)(void*), void* context) {
  if (leads_crew() || omp_in_parallel() || omp_get_max_threads() == 1) return lead(context);
  Crew crew;
#pragma omp parallel
  {
    if (omp_get_thread_num() == 0) {
      led_crew = &crew;
      lead(context);
      led_crew = nullptr;
      crew.over.store(true, std::memory_order_release);
    } else {
      follow(crew);
    }
  }
}

const Error kOutOfMemory = "out of memory";

void* thread_scratch(Use use, size_t bytes) {
  static thread_local ThreadScratch scratches[3];
  ThreadScratch& scratch = scratches[use];
  if (!scratch.data || bytes > scratch.size || kExactScratch) {
    std::free(scratch.data);
    scratch.data = allocate(bytes);
    scratch.size = scratch.data ? bytes : 0;
  }
  return scratch.data;
}

int64_t max_threads() { return omp_get_max_threads(); }

Error run_tasks(int64_t tasks, int64_t work, size_t scratch_bytes, void (*body)(const void*, int64_t, void*),
                const void* context) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  auto share = [&] {
    void* scratch = thread_scratch(kPanels, scratch_bytes);
    if (!scratch) {
      failed.store(true, std::memory_order_relaxed);
      return;
    }
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) body(context, task, scratch);
  };
  const bool crew = leads_crew();
  if (tasks <= 1 || work <= (crew ? kCrewWork : kSerialWork)) {
    share();
  } else if (crew) {
    share_with_crew([](void* of) { (*(decltype(share)*)of)(); }, &share);
  } else {
#pragma omp parallel
    share();
  }
  return failed.load(std::memory_order_relaxed) ? kOutOfMemory : nullptr;
}

}  // namespace vops
