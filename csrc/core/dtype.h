// Element types a kernel may meet. C headers only: files compiled with wider instruction sets include this.
#pragma once

#include <stdint.h>

namespace vivace {

enum class Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3, kFloat8 = 4 };  // 8: e4m3fn

constexpr int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 || dtype == Dtype::kFloat8 ? 1 : 2;
}

}  // namespace vivace
