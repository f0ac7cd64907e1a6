// Keeps what a row of a plan computed: f = fresh - base becomes plane 0 and its backward differences the planes behind;
// the residual that f is for is added in the same pass.
//
//   D_0' = f,  D_{j+1}' = D_j' - D_j for j < made,  out = hidden + gate * f
//
// A difference is that of the new value, not rounded yet, to the old plane as it is stored, and is rounded once, by the
// store; out is of f itself. Arithmetic is float32, products and sums rounded one by one: the same bits on every
// instruction set, and out is what `gated_residual` or the epilogue of a linear gives.
#pragma once

#include "ops/kept.h"

namespace vivace {

struct CacheUpdateArgs {
  RowTensor fresh, base;  // one dtype; no base: f = fresh
  KeptRows kept;
  int64_t made;                 // differences made; the row has more planes than that, and keeps those behind
  RowTensor hidden, gate, out;  // no hidden: nothing is added; no gate: 1; out may be hidden
  RowShape shape;
};

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_cache_update(const CacheUpdateArgs& args);

// Floats of scratch memory that rows of this width take: the gate and what is to be kept, as float32.
constexpr int64_t cache_update_scratch(int64_t width) { return 2 * width; }

// What a row costs, as bytes moved an element.
int64_t cache_update_bytes(const CacheUpdateArgs& args);

void cache_update(const CacheUpdateArgs& args, int64_t threads);

}  // namespace vivace
