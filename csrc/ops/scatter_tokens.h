// Rows of some tokens put in their places among all: full[r, ids[r mod samples, m]] becomes fresh[r, m], fresh and
// second side by side, or hidden + gate * fresh, product and sum rounded one by one in float32.
#pragma once

#include "ops/gather_tokens.h"

namespace vivace {

struct ScatterTokensArgs {
  TokenIds ids;          // given
  RowTensor full;        // [batch, ids.tokens, width], float32 or bfloat16 whatever fresh is
  void* const* full_at;  // [batch]: where the rows of each sample begin; null: full.sample_stride apart from full.data
  RowTensor fresh, second;  // float32 or bfloat16 alike; no second: fresh is as wide as full
  int64_t first;            // width of fresh, where there is a second
  RowTensor hidden, gate;   // no hidden: nothing is added; no gate: 1; none of them beside second
  RowShape shape;           // of fresh and second together
};

// Throws when the arguments are no legal call; false when there is nothing to do. Whether ids are distinct is not seen.
bool check_scatter_tokens(const ScatterTokensArgs& args);

// Floats of scratch memory that rows of this width take: the gate as float32.
constexpr int64_t scatter_tokens_scratch(int64_t width) { return width; }

void scatter_tokens(const ScatterTokensArgs& args, int64_t threads);

}  // namespace vivace
