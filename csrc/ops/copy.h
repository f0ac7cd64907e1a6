// Plain copies over the same pool as the kernels: the measured roofline of memory-bound ops.
#pragma once

#include <stdint.h>

namespace vivace {

void copy_memcpy(void* dst, const void* src, int64_t bytes, int64_t threads);
// Non-temporal stores; dst aligned to 64 bytes, src to 4.
void copy_stream(void* dst, const void* src, int64_t bytes, int64_t threads);

}  // namespace vivace
