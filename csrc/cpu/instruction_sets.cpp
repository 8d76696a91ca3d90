#include "instruction_sets.h"

#include <cstdlib>
#include <cstring>

namespace vops {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

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
      if (!std::strcmp(name, kNames[i])) return i;
    }
  }
  return best;
}

}  // namespace

int instruction_set() {
  static const int set = chosen();
  return set;
}

const char* instruction_set_name() { return kNames[instruction_set()]; }

}  // namespace vops
