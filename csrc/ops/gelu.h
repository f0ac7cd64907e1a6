// out = gelu(hidden), or hidden * gelu(gate), over rows, in float32; the bits are the same on every instruction set.
#pragma once

#include "ops/rows.h"

namespace vivace {

struct GeluArgs {
  RowTensor hidden, gate, out;  // gate may be absent; out may be hidden
  RowShape shape;
  bool tanh;  // the approximation by a hyperbolic tangent
};

void gelu(const GeluArgs& args, int64_t threads);

}  // namespace vivace
