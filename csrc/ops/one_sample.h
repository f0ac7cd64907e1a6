// Samples of one row each, as matrices of two axes arrive, are rows of one sample: then neighbours are worked on in one
// go.
#pragma once

#include "ops/rows.h"

namespace vivace {

// Args: of a linear.
template <typename Args>
Args as_one_sample(const Args& args) {
  Args merged = args;
  if (args.shape.tokens != 1) return merged;
  for (RowTensor* tensor : {&merged.x, &merged.gate, &merged.residual, &merged.out})
    tensor->token_stride = tensor->sample_stride;
  merged.shape = {1, args.shape.batch, args.shape.width};
  return merged;
}

}  // namespace vivace
