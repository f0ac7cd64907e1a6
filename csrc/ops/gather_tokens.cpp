#include "ops/gather_tokens.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_gather_tokens(const GatherTokensArgs& args) {
  const char* op = "gather_tokens";
  if (!has_rows(op, args.shape)) return false;
  if (args.ids.ids == nullptr) fail(op, ": ids has no memory");
  check_ids(op, args.ids, args.shape.batch, args.shape.tokens);
  check_rows(op, "x", args.x, args.x.dtype, false);
  check_rows(op, "out", args.out, args.x.dtype, false);
  if (args.normed.data == nullptr) return true;
  return check_norm(
      op, {args.out, args.scale, args.shift, args.weight, args.bias, args.normed, args.shape, args.centred, args.eps});
}

void gather_tokens(const GatherTokensArgs& args, int64_t threads) {
  if (!check_gather_tokens(args)) return;
  const int64_t size = dtype_size(args.x.dtype);
  const int64_t bytes = 2 * size + (args.normed.data == nullptr ? 0 : norm_bytes(args.x.dtype));
  for_rows(args.shape, bytes, gather_tokens_scratch(args.shape.width), threads, kernels().gather_tokens_rows, &args);
}

}  // namespace vivace
