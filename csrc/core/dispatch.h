// One body per kernel, compiled once per instruction set; the best one this CPU has is chosen when the library is loaded.
#pragma once

#include "dtype.h"

namespace iumad {

enum class Isa { kBaseline, kAvx2, kAvx512 };  // kBaseline: SSE2 on x86-64, NEON on aarch64

bool isa_supported(Isa isa);  // compiled in, and this CPU and operating system have it
bool isa_emulated();          // the kernels above AVX2 run in plain C++, see tests/cpu_emulation
Isa current_isa();
void set_isa(Isa isa);  // for tests and benchmarks; must be supported
const char* isa_name(Isa isa);

// Whether fewer instructions beat fewer multiply-adds: Intel's cores have the same two pipes of 512 bits for those and for
// additions, AMD's have others for additions.
bool multiply_adds_cost_no_more();

// Instructions that multiply bfloat16 matrices and convert to bfloat16, used by the kernels that have a form for them while the
// instruction set is AVX-512.
enum class Bf16 { kNone, kAvx512, kAmx };

bool bf16_supported(Bf16 unit);  // for AMX this includes the operating system's permission, asked for here
Bf16 current_bf16();             // kNone below AVX-512
void set_bf16(Bf16 unit);        // for tests and benchmarks; must be supported
const char* bf16_name(Bf16 unit);

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
// And a form for bfloat16 tensors: avx512_bf16::NAME, for_amx::NAME (for_amx is amx where the kernel has a form for its tiles,
// else avx512_bf16), and the function NAME_kernels(dtype) that returns the one in use for tensors of that type.
#define IUMAD_DECLARE_BF16_KERNELS(Type, name, for_amx)     \
  namespace avx512_bf16 {                                   \
  extern const Type name;                                   \
  }                                                         \
  namespace for_amx {                                       \
  extern const Type name;                                   \
  }                                                         \
  inline const Type& name##_kernels(DType dtype) {          \
    if (dtype != DType::kBFloat16) return name##_kernels(); \
    switch (current_bf16()) {                               \
      case Bf16::kAmx:                                      \
        return for_amx::name;                               \
      case Bf16::kAvx512:                                   \
        return avx512_bf16::name;                           \
      default:                                              \
        return name##_kernels();                            \
    }                                                       \
  }
#else
#define IUMAD_DECLARE_BF16_KERNELS(Type, name, for_amx) \
  inline const Type& name##_kernels(DType) { return name##_kernels(); }
#define IUMAD_DECLARE_KERNELS(Type, name) \
  namespace baseline {                    \
  extern const Type name;                 \
  }                                       \
  inline const Type& name##_kernels() { return baseline::name; }
#endif

}  // namespace iumad
