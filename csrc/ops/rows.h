// Tensors [batch, tokens, width] whose rows may lie anywhere, and their distribution over threads.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace vivace {

// Element (b, n, i) is data[b * sample_stride + n * token_stride + i]; strides in elements, 0 repeats. No data: absent.
struct RowTensor {
  void* data;
  Dtype dtype;
  int64_t sample_stride, token_stride;
};

struct RowShape {
  int64_t batch, tokens, width;
};

// A task of an op over rows: rows [begin, end) of one sample. `scratch` holds what its op asked for.
using RowTask = void (*)(const void* args, int64_t sample, int64_t begin, int64_t end, float* scratch);

// Throws unless the shape fits memory; false when there is nothing to do.
bool has_rows(const char* op, const RowShape& shape);

// Throws unless the tensor is there (or may be absent) and of a dtype the ops over rows take, which is that of `like`
// or, for a vector, float32.
void check_rows(const char* op, const char* name, const RowTensor& tensor, Dtype like, bool vector);

// Runs `task` on all rows, in pieces that do not depend on the number of threads. `bytes` an element say what a row
// costs, `scratch` how many floats a task gets.
void for_rows(const RowShape& shape, int64_t bytes, int64_t scratch, int64_t threads, RowTask task, const void* args);

}  // namespace vivace
