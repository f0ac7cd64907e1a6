// Matrices packed for the micro-kernels of gemm.inl.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace vivace {

constexpr int64_t kPanel = 64;                            // columns of a panel
constexpr int64_t kProductOperations = int64_t{3} << 20;  // of one call of Kernels::products: whole steps of all sets

// A linear's weight [columns, depth] as panels of 64 columns, the last one padded with zeros: float32
// [panels][depth][64], bfloat16 [panels][ceil(depth / 2)][64][2], int8 [panels][ceil(depth / 4)][64][4] and then the
// sum of every column, int32 [panels][64]. 64-byte aligned.
struct PackedMatrix {
  const void* data;
  int64_t columns, depth;
  Dtype dtype;  // float32, bfloat16 or int8
};

// Throws for sizes that fit no memory and for other dtypes, unknown codes among them.
int64_t packed_bytes(int64_t columns, int64_t depth, Dtype dtype);

// Element (n, k) of the source is src[n * row_stride + k].
void pack_matrix(void* dst, const void* src, int64_t columns, int64_t depth, int64_t row_stride, Dtype dtype,
                 int64_t threads);

// Does nothing but multiply and add numbers of a dtype, from registers and the first-level cache, some 10 us on each of
// `threads` threads for every step. Returns the operations done: the roofline that benches compare products with.
int64_t run_products(Dtype dtype, int64_t steps, int64_t threads);

}  // namespace vivace
