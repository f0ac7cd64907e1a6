// What a row of a plan reuses or forecasts from values that earlier rows kept, added to the hidden states or alone.
//
//   v = sum of weights[r, j] * plane j,  out = hidden + gate * v, or v
//
// Arithmetic is float32, products and sums rounded one by one, planes in order: the same bits on every instruction set.
#pragma once

#include "ops/kept.h"

namespace vivace {

struct CacheApplyArgs {
  KeptRows kept;
  const float* weights;         // [batch, terms]
  int64_t terms;                // planes read, at least one
  RowTensor hidden, gate, out;  // no hidden: out = v; no gate: 1; out may be hidden
  RowShape shape;
};

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_cache_apply(const CacheApplyArgs& args);

// Floats of scratch memory that rows of this width take: the gate as float32.
constexpr int64_t cache_apply_scratch(int64_t width) { return width; }

// What a row costs, as bytes moved an element.
int64_t cache_apply_bytes(const CacheApplyArgs& args);

void cache_apply(const CacheApplyArgs& args, int64_t threads);

}  // namespace vivace
