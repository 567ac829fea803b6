// bfloat16 as CUDA's header of the same name has it: conversions only.
#pragma once

#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {  // to nearest, ties to even; every NaN becomes the one CUDA makes
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (f != f) return {0x7fff};
  return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
