// out = residual + gate * act(x_scale weight_scale (x W^T) + bias) over rows of 8-bit integers, W packed; rows of other
// numbers are quantized first, each by its own scale.
//
// Sums are exact int32 on every instruction set, what follows is that of ops/linear.h in float32: the same bits.
#pragma once

#include "ops/linear.h"

namespace vivace {

constexpr int64_t kMostInt8Depth = (int64_t{1} << 17) - 1;  // products of [-128, 127] whose sum int32 always holds

struct Int8LinearArgs {
  RowTensor x;                // int8 [batch, tokens, K]; for int8_linear() float32 | bfloat16 too
  const float* x_scale;       // [batch, tokens], contiguous; of integers only
  PackedMatrix weight;        // int8 [N, K]
  const float* weight_scale;  // [N]
  const float* bias;          // from here on as in LinearArgs
  Activation activation;
  RowTensor gate, residual, out;
  RowShape shape;
  const float* smooth = nullptr;  // [K] or null: x is multiplied by it before it is quantized
};

// As those of ops/linear.h; x is int8.
int64_t int8_linear_tasks(const Int8LinearArgs& args);
int64_t int8_linear_scratch(const Int8LinearArgs& args);
void int8_linear_task(const Int8LinearArgs& args, int64_t task, float* scratch);
bool check_int8_linear(const Int8LinearArgs& args);

// Quantizes x, where it is not int8, as quantize_tokens does, by the threads that multiply it afterwards.
void int8_linear(const Int8LinearArgs& args, int64_t threads);

}  // namespace vivace
