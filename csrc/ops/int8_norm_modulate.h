// norm_modulate in float32, then quantize_tokens: the integers of the two ops one after another, in one pass.
#pragma once

#include "ops/norm_modulate.h"

namespace vivace {

struct Int8NormModulateArgs {
  NormModulateArgs norm;        // its out is not used
  const float *smooth, *given;  // from here on as in QuantizeTokensArgs
  int8_t* q;
  float* scale;
};

// Floats of scratch memory that rows of this width take; the row lies where its vectors were widened.
constexpr int64_t int8_norm_scratch(int64_t width) { return norm_scratch(width); }

// What a row costs, as bytes moved an element.
constexpr int64_t int8_norm_bytes(Dtype dtype) { return norm_bytes(dtype) + 9; }

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_int8_norm(const char* op, const Int8NormModulateArgs& args);

void int8_norm_modulate(const Int8NormModulateArgs& args, int64_t threads);

}  // namespace vivace
