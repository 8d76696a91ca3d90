// The kernels are compiled once per instruction set; the processor decides at run time which are used.
#pragma once

namespace vops {

// The place of the best one for this processor among baseline, AVX2 and AVX-512.
// VISION_OPS_CPU_ISA=baseline|avx2|avx512, read once, may lower the choice.
int instruction_set();
const char* instruction_set_name();

}  // namespace vops

// In namespace vops: cpu_<name>(), an op's table of functions. Each instruction set has one, <namespace>::<name>_ops.
#ifdef VOPS_X86
#define VOPS_CPU_OP(type, name)                                                                               \
  namespace baseline {                                                                                        \
  extern const type name##_ops;                                                                               \
  }                                                                                                           \
  namespace avx2 {                                                                                            \
  extern const type name##_ops;                                                                               \
  }                                                                                                           \
  namespace avx512 {                                                                                          \
  extern const type name##_ops;                                                                               \
  }                                                                                                           \
  inline const type& cpu_##name() {                                                                           \
    static constexpr const type* kTables[] = {&baseline::name##_ops, &avx2::name##_ops, &avx512::name##_ops}; \
    return *kTables[instruction_set()];                                                                       \
  }
#else
#define VOPS_CPU_OP(type, name) \
  namespace baseline {          \
  extern const type name##_ops; \
  }                             \
  inline const type& cpu_##name() { return baseline::name##_ops; }
#endif
