// out = softmax(scale * query key^T) value, head by head, without a mask.
//
// Products are summed in float32, the softmax is float32; of bfloat16 heads the weights are rounded to bfloat16 for the
// second product. A row of the result has the same bits whatever the batch, the other rows and the threads.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "ops/qk_norm_rope.h"

namespace vivace {

// Heads of `width` elements side by side: float32 or bfloat16; strides of what is read may be 0. out may be query, and
// shares no memory with key or value. Keys and values of a sample may lie anywhere, as those kept from an earlier row
// do: key_at and value_at then say where they begin, and neither data nor sample_stride of key or value is read.
struct AttentionArgs {
  HeadTensor query, key, value, out;  // [batch, queries | keys | keys | queries, heads, width]
  Dtype dtype;
  int64_t batch, heads, queries, keys, width;
  float scale;                          // more than 0
  const void* const* key_at = nullptr;  // [batch]
  const void* const* value_at = nullptr;
};

// How a task goes about its block, from the sizes alone. Offsets into its scratch count floats.
struct AttentionBlocks {
  int64_t queries, keys, strip;    // rows of a task, of a block of keys, of what goes through the softmax together
  int64_t words, columns, padded;  // of a key, of a row of sums, of a row of scores
  int64_t key_at, value_at, score_at, sum_at, state_at, end;
};
AttentionBlocks attention_blocks(const AttentionArgs& args);

// A task is a block of queries of one head; how many there are depends on the sizes alone. Tasks may run in any order
// on any thread, each with `attention_scratch` floats of its own. Neither allocates nor throws.
int64_t attention_tasks(const AttentionArgs& args);
int64_t attention_scratch(const AttentionArgs& args);
int64_t attention_most_scratch(const AttentionArgs& args);  // enough with fewer queries or keys, too
void attention_task(const AttentionArgs& args, int64_t task, float* scratch);

// Throws unless the arguments are a legal call.
void check_attention(const AttentionArgs& args);

void attention(const AttentionArgs& args, int64_t threads);

}  // namespace vivace
