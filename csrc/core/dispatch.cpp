#include "dispatch.h"

#include <atomic>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace iumad {
namespace {

Isa best_isa() {
  if (isa_supported(Isa::kAvx512)) return Isa::kAvx512;
  if (isa_supported(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kBaseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

#if defined(__x86_64__)
// Linux saves the tile registers only for processes that asked; once is enough for all threads.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

// For what the builtin does not know by name in every supported compiler.
bool cpu_has(int leaf, int part, int reg, int bit) {
  unsigned r[4];
  __asm__("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(part));
  return (r[reg] >> bit) & 1;
}
#endif

Bf16 best_bf16() {
  if (bf16_supported(Bf16::kAmx)) return Bf16::kAmx;
  if (bf16_supported(Bf16::kAvx512)) return Bf16::kAvx512;
  return Bf16::kNone;
}

std::atomic<Bf16>& chosen_bf16() {
  static std::atomic<Bf16> unit{best_bf16()};
  return unit;
}

}  // namespace

bool isa_emulated() {
#if defined(IUMAD_EMULATED)
  return true;
#else
  return false;
#endif
}

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {  // the builtins also ask whether the operating system saves the wide registers
    case Isa::kAvx512:
      if (isa_emulated()) return isa_supported(Isa::kAvx2);
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu_has(1, 0, 2, 29);
    default:
      return true;
  }
#else
  return isa == Isa::kBaseline;
#endif
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }
void set_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

bool multiply_adds_cost_no_more() {
#if defined(__x86_64__)
  static const bool intel = __builtin_cpu_is("intel") || isa_emulated();  // emulated, to be tested
  return intel;
#else
  return false;
#endif
}

bool bf16_supported([[maybe_unused]] Bf16 unit) {
#if defined(__x86_64__)
  if (unit == Bf16::kNone) return true;
  if (isa_emulated()) return isa_supported(Isa::kAvx512);
  const bool avx512 = isa_supported(Isa::kAvx512) && cpu_has(7, 1, 0, 5);  // 7.1 eax: AVX512_BF16
  if (unit == Bf16::kAvx512) return avx512;
  return avx512 && cpu_has(7, 0, 3, 22) && cpu_has(7, 0, 3, 24) && tiles_permitted();  // 7.0 edx: AMX_BF16, AMX_TILE
#else
  return unit == Bf16::kNone;
#endif
}

Bf16 current_bf16() { return current_isa() == Isa::kAvx512 ? chosen_bf16().load(std::memory_order_relaxed) : Bf16::kNone; }
void set_bf16(Bf16 unit) { chosen_bf16().store(unit, std::memory_order_relaxed); }

const char* bf16_name(Bf16 unit) {
  switch (unit) {
    case Bf16::kAmx:
      return "amx";
    case Bf16::kAvx512:
      return "avx512_bf16";
    default:
      return "none";
  }
}

}  // namespace iumad
