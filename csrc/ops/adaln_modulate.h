// h = hidden + gate * update, then m = (norm(h) * weight + bias) * (1 + scale) + shift, row by row.
#pragma once

#include "ops/gated_residual.h"
#include "ops/norm_modulate.h"

namespace vivace {

struct AdalnModulateArgs {
  GatedResidualArgs residual;  // its out is h
  NormModulateArgs norm;       // its hidden is h, its out is m
};

void adaln_modulate(const AdalnModulateArgs& args, int64_t threads);

}  // namespace vivace
