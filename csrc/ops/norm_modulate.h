// out = (norm(hidden) * weight + bias) * (1 + scale) + shift over rows, in float32.
//
// The bits are those of this order, on every instruction set: sums as in norm_modulate.inl; what multiplies a row,
// a = weight * (1 + scale), and what is added, c = bias * (1 + scale) + shift, made once; out = norm * a + c, rounded
// to the dtype of out: that of hidden, whose memory it may share, or bfloat16.
#pragma once

#include "ops/rows.h"

namespace vivace {

struct NormModulateArgs {
  RowTensor hidden, scale, shift, weight, bias, out;  // the four in the middle may be absent
  RowShape shape;
  bool centred;  // layer norm: the mean is taken off; else RMS norm
  double eps;
};

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_norm(const char* op, const NormModulateArgs& args);

// Floats of scratch memory that rows of this width take.
constexpr int64_t norm_scratch(int64_t width) { return 3 * width; }

// What a norm costs, as bytes moved an element: its row is read three times, twice from the first-level cache.
constexpr int64_t norm_bytes(Dtype dtype) { return 4 * dtype_size(dtype); }

void norm_modulate(const NormModulateArgs& args, int64_t threads);

}  // namespace vivace
