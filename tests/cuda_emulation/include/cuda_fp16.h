// float16 as CUDA's header of the same name has it: conversions only.
#pragma once

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float f) { return {_Float16(f)}; }
