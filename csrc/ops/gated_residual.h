// out = hidden + gate * update over rows; product and sum rounded one by one, in float32.
#pragma once

#include "ops/rows.h"

namespace vivace {

struct GatedResidualArgs {
  RowTensor hidden, update, gate, out;  // out may be hidden or update; no gate: out = hidden + update
  RowShape shape;
};

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_residual(const char* op, const GatedResidualArgs& args);

void gated_residual(const GatedResidualArgs& args, int64_t threads);

}  // namespace vivace
