// Element types a kernel reads and writes. The numbers are this library's own, not torch's.
#pragma once

#include <cstdint>

namespace iumad {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

constexpr int64_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

}  // namespace iumad
