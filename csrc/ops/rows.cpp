#include "ops/rows.h"

#include <algorithm>
#include <memory>

#include "core/error.h"
#include "core/float_mode.h"
#include "core/thread_pool.h"

namespace vivace {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 16;  // 10 us or so: enough to hide what a task costs besides

}  // namespace

bool has_rows(const char* op, const RowShape& shape) {
  const auto [batch, tokens, width] = shape;
  if (batch < 0 || tokens < 0 || width < 0)
    fail(op, ": a size of [", batch, ", ", tokens, ", ", width, "] is negative");
  if (static_cast<double>(batch) * static_cast<double>(tokens) * static_cast<double>(width) > 0x1p60)
    fail(op, ": [", batch, ", ", tokens, ", ", width, "] fits no memory");
  return batch * tokens * width > 0;
}

void check_rows(const char* op, const char* name, const RowTensor& tensor, Dtype like, bool vector) {
  if (tensor.data == nullptr) {
    if (vector) return;
    fail(op, ": ", name, " has no memory");
  }
  if (tensor.dtype != like && !(vector && tensor.dtype == Dtype::kFloat32)) fail(op, ": ", name, " has another dtype");
  if (tensor.dtype != Dtype::kFloat32 && tensor.dtype != Dtype::kBfloat16)
    fail(op, ": ", name, " is neither float32 nor bfloat16");
}

void for_rows(const RowShape& shape, int64_t bytes, int64_t scratch, int64_t threads, RowTask task, const void* args) {
  const int64_t rows = std::max<int64_t>(1, kTaskElements / shape.width);
  const int64_t pieces = (shape.tokens + rows - 1) / rows;
  const int64_t work = bytes * shape.batch * shape.tokens * shape.width;
  parallel_for(threads_for(work, threads), shape.batch * pieces, [&](int64_t index) {
    const FloatMode mode;
    const std::unique_ptr<float[]> memory(new float[static_cast<size_t>(scratch)]);  // not initialised
    const int64_t begin = index % pieces * rows;
    task(args, index / pieces, begin, std::min(begin + rows, shape.tokens), memory.get());
  });
}

}  // namespace vivace
