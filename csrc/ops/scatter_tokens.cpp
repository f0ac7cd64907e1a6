#include "ops/scatter_tokens.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_scatter_tokens(const ScatterTokensArgs& args) {
  const char* op = "scatter_tokens";
  if (!has_rows(op, args.shape)) return false;
  if (args.ids.ids == nullptr) fail(op, ": ids has no memory");
  check_ids(op, args.ids, args.shape.batch, args.shape.tokens);
  const Dtype like = args.fresh.dtype;
  if (args.full.dtype != Dtype::kFloat32 && args.full.dtype != Dtype::kBfloat16)
    fail(op, ": full is neither float32 nor bfloat16");
  for (int64_t r = 0; r < args.shape.batch; ++r) {
    if ((args.full_at == nullptr ? args.full.data : args.full_at[r]) == nullptr)
      fail(op, ": full has no memory for row ", r);
  }
  check_rows(op, "fresh", args.fresh, like, false);
  check_rows(op, "hidden", args.hidden, like, true);
  if (args.hidden.data != nullptr && args.hidden.dtype != like) fail(op, ": hidden has another dtype");
  check_rows(op, "gate", args.gate, like, true);
  if (args.gate.data != nullptr && args.hidden.data == nullptr) fail(op, ": gate without hidden");
  if (args.second.data == nullptr) return true;
  check_rows(op, "second", args.second, like, false);
  if (args.second.dtype != like) fail(op, ": second has another dtype");
  if (args.hidden.data != nullptr) fail(op, ": hidden beside second");
  if (args.first < 0 || args.first > args.shape.width)
    fail(op, ": fresh is ", args.first, " wide of ", args.shape.width);
  return true;
}

void scatter_tokens(const ScatterTokensArgs& args, int64_t threads) {
  if (!check_scatter_tokens(args)) return;
  const int64_t read = dtype_size(args.fresh.dtype) * (args.hidden.data == nullptr ? 1 : 2);
  for_rows(args.shape, read + dtype_size(args.full.dtype), scatter_tokens_scratch(args.shape.width), threads,
           kernels().scatter_tokens_rows, &args);
}

}  // namespace vivace
