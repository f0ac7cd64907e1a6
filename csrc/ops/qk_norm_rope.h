// out = norm(x) * weight + bias, turned by cos and sin, for queries and keys, in float32; the bits are the same on
// every instruction set.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace vivace {

// Element (b, n, h, i) is data[b * sample_stride + n * token_stride + h * head_stride + i]; strides in elements.
struct HeadTensor {
  void* data;
  int64_t sample_stride, token_stride, head_stride;
};

// Row r of sample b begins at data[b * sample_stride + r * row_stride].
struct TurnTable {
  const float* data;
  int64_t sample_stride, row_stride;
};

// [width] or [heads * width] elements; no data: absent.
struct HeadVector {
  const void* data;
  Dtype dtype;
  int64_t size;
};

enum class HeadNormKind : int32_t { kNone = 0, kRms = 1, kLayer = 2 };

struct QkSide {
  HeadTensor x, out;  // out may be x
  HeadVector weight, bias;
  int64_t tokens, heads;
  bool turned;
};

struct QkNormRopeArgs {
  QkSide side[2];  // queries, keys
  int64_t batch, width;
  Dtype dtype;
  HeadNormKind kind;
  double eps;
  TurnTable cos, sin;
  int64_t first_row, rows;  // tokens first_row .. first_row + rows - 1 are turned
  bool halves;              // channels i and i + width / 2 are a pair, else 2i and 2i + 1
};

void qk_norm_rope(const QkNormRopeArgs& args, int64_t threads);

// What the kernel takes besides: vectors of one side in float32 (null: absent), and whether a norm covers all heads.
struct QkVectors {
  const float *weight, *bias;
  bool across;
};

}  // namespace vivace
