// Rows of some tokens side by side: out[r, m] = x[r, ids[r mod samples, m]], and the same normalised and modulated.
//
// `normed` has the bits of norm_modulate of `out`.
#pragma once

#include "ops/kept.h"
#include "ops/norm_modulate.h"

namespace vivace {

struct GatherTokensArgs {
  TokenIds ids;                                  // given
  RowTensor x, out;                              // x: [batch, ids.tokens, width]
  RowTensor scale, shift, weight, bias, normed;  // no normed: nothing is normalised
  RowShape shape;                                // of out
  bool centred;
  double eps;
};

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_gather_tokens(const GatherTokensArgs& args);

// Floats of scratch memory that rows of this width take.
constexpr int64_t gather_tokens_scratch(int64_t width) { return norm_scratch(width); }

void gather_tokens(const GatherTokensArgs& args, int64_t threads);

}  // namespace vivace
