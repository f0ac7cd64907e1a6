// Which tokens of a picture a row computes: ranked by a score, old ones first where they must be. The definition is
// kernels/select_tokens; ids and ages are the same on every instruction set, with any number of threads.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace vivace {

enum class TokenMetric : int32_t { kDeviation = 0, kNorm = 1 };

constexpr int64_t kMostPlanes = 4, kMostAxes = 8;

struct SelectTokensArgs {
  // Scores of pixels: v_c = sum of weights[b, j] * plane j; float32, bfloat16 or float16, samples a stride apart, each
  // in one piece [channels, *(grid * patch)].
  const void* const* planes;
  const int64_t* plane_strides;  // elements between samples
  int64_t plane_count;           // 0: scores are given
  Dtype dtype;
  const float* weights;  // [batch, plane_count]
  int64_t channels;
  const int64_t *grid, *patch;  // [axes]: tokens along an axis, and pixels of one
  int64_t axes;
  TokenMetric metric;
  const float* scores;  // [batch, tokens] instead of planes

  int32_t *ages, *ids;  // [batch, tokens], read and written; [batch, keep]
  int64_t batch, tokens, keep;
  int64_t lowest;        // tokens dropped from the bottom of the ranking, 0 .. tokens - keep
  const float* factors;  // [factor_count] by age, or none: 1
  int64_t factor_count;
  int64_t bound, least;  // bound -1: no token has to be computed
};

// Pixels of a sample.
int64_t token_pixels(const SelectTokensArgs& args);

void select_tokens(const SelectTokensArgs& args, int64_t threads);

}  // namespace vivace
