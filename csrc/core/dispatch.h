// One body per kernel, compiled once per instruction set; the best one this CPU has is chosen when the library is loaded.
#pragma once

namespace iumad {

enum class Isa { kBaseline, kAvx2, kAvx512 };  // kBaseline: SSE2 on x86-64, NEON on aarch64

bool isa_supported(Isa isa);  // compiled in, and this CPU and operating system have it
Isa current_isa();
void set_isa(Isa isa);  // for tests and benchmarks; must be supported
const char* isa_name(Isa isa);

// Declares baseline::NAME, avx2::NAME, avx512::NAME (each defined by one compilation of core/NAME.cpp) and the function
// NAME_kernels() that returns the one in use.
#if defined(__x86_64__)
#define IUMAD_DECLARE_KERNELS(Type, name) \
  namespace baseline {                    \
  extern const Type name;                 \
  }                                       \
  namespace avx2 {                        \
  extern const Type name;                 \
  }                                       \
  namespace avx512 {                      \
  extern const Type name;                 \
  }                                       \
  inline const Type& name##_kernels() {   \
    switch (current_isa()) {              \
      case Isa::kAvx512:                  \
        return avx512::name;              \
      case Isa::kAvx2:                    \
        return avx2::name;                \
      default:                            \
        return baseline::name;            \
    }                                     \
  }
#else
#define IUMAD_DECLARE_KERNELS(Type, name) \
  namespace baseline {                    \
  extern const Type name;                 \
  }                                       \
  inline const Type& name##_kernels() { return baseline::name; }
#endif

}  // namespace iumad
