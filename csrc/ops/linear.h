// out = residual + gate * act(x W^T + bias) over rows, W packed, in float32, rounded once.
//
// The bits of a row depend on nothing but that row and the vectors beside it: not on how many rows there are, on tasks
// or threads. float32 has the same ones on every instruction set.
#pragma once

#include "ops/gemm.h"
#include "ops/rows.h"

namespace vivace {

enum class Activation : int32_t { kNone, kGelu, kGeluTanh, kSilu };

struct LinearArgs {
  RowTensor x;          // [batch, tokens, K], dtype of the weight
  PackedMatrix weight;  // [N, K]
  const float* bias;    // [N] or absent
  Activation activation;
  RowTensor gate;      // float32 [batch, tokens, N] or absent
  RowTensor residual;  // dtype of out, or absent
  RowTensor out;       // float32 or bfloat16; may be the residual, not x
  RowShape shape;      // batch, tokens, K
};

// How a linear is cut: panel by panel, and the rows of a panel in blocks, so that a panel is read by one thread while
// it is in its cache. Rows whose memory is not evenly spaced from sample to sample are cut at samples.
struct LinearSplit {
  int64_t panels, groups, blocks;  // tasks: panels * groups * blocks
  int64_t group_rows, block_rows;
  int64_t stride;  // elements from row to row of x in a group
};
LinearSplit split_rows(const RowTensor& x, const RowShape& shape, int64_t columns);

constexpr int64_t kLinearRows = 48;  // most rows of a block

// Task by task, for a caller that has threads of its own and has checked the arguments: any order, any thread. A task
// never allocates; it takes `linear_scratch` floats, which no other task uses meanwhile.
int64_t linear_tasks(const LinearArgs& args);
int64_t linear_scratch(const LinearArgs& args);
void linear_task(const LinearArgs& args, int64_t task, float* scratch);

// Throws when the arguments are no legal call; false when there is nothing to do.
bool check_linear(const LinearArgs& args);

void linear(const LinearArgs& args, int64_t threads);

// Parts of the check that int8_linear shares.
bool check_products(const char* op, const RowShape& shape, const PackedMatrix& weight, Activation activation);
void check_results(const char* op, const RowTensor& gate, const RowTensor& residual, const RowTensor& out);

}  // namespace vivace
