// q = x smooth / scale, rounded to the nearest integer, half to even, within [-127, 127]: rows as 8-bit integers.
//
// Arithmetic is float32, each operation rounded correctly: the same integers and scales on every instruction set.
#pragma once

#include "ops/rows.h"

namespace vivace {

struct QuantizeTokensArgs {
  RowTensor x;          // float32 | bfloat16 [batch, tokens, K]
  const float* smooth;  // [K] or null: x is multiplied by it first
  const float* given;  // [batch]: the scale of all rows of a sample; null or not above 0: max |x smooth| / 127 of a row
  int8_t* q;           // [batch, tokens, K], contiguous
  float* scale;        // [batch, tokens], contiguous; 1 for rows of zeros, NaN (and q 0) for rows with NaN or infinity
  RowShape shape;
};

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_quantize(const char* op, const QuantizeTokensArgs& args);

// Floats of scratch memory that rows of this width take.
constexpr int64_t quantize_scratch(int64_t) { return 1; }

// What a row costs, as bytes moved an element: it is read twice, once from the first-level cache.
constexpr int64_t quantize_bytes(Dtype dtype) { return 2 * dtype_size(dtype) + 1; }

void quantize_tokens(const QuantizeTokensArgs& args, int64_t threads);

}  // namespace vivace
