// Values that rows of a plan keep for later ones: planes in memory of their own, the newest value first, then its
// backward differences.
#pragma once

#include "ops/rows.h"

namespace vivace {

// What one row of a call keeps: planes [P, N, W] in the dtype of the store; int8: and a scale a token [P, N].
struct KeptRow {
  void* values;
  float* scales;
};

// Which of the kept tokens those of a call are, where it is about some: token m of row r is ids[r % samples, m].
struct TokenIds {
  const int32_t* ids;           // [samples, those of the call]; null: the call is about all of them
  int64_t samples = 1, tokens;  // tokens: that are kept
};

// [batch]; plane j lies j * tokens * width elements behind the first. float32, bfloat16, float16, float8 (e4m3fn: what
// lies beyond 448 is cut off, also infinity) or int8 (scales and integers as quantize_tokens makes them).
struct KeptRows {
  const KeptRow* rows;
  Dtype dtype;
  TokenIds some{};
};

// Throws unless every row has memory and the dtype is that of a store.
void check_kept(const char* op, const KeptRows& kept, int64_t batch);

// Throws unless every id of `count` tokens a sample is that of a kept token, and samples share rows evenly.
void check_ids(const char* op, const TokenIds& some, int64_t batch, int64_t count);

// Throws unless hidden, where it is there, has an `out` of its dtype, and the gate suits them.
void check_hidden(const char* op, const RowTensor& hidden, const RowTensor& gate, const RowTensor& out);

}  // namespace vivace
