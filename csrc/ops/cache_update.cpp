#include "ops/cache_update.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_cache_update(const CacheUpdateArgs& args) {
  const char* op = "cache_update";
  if (!has_rows(op, args.shape)) return false;
  check_rows(op, "fresh", args.fresh, args.fresh.dtype, false);
  if (args.base.data != nullptr) check_rows(op, "base", args.base, args.fresh.dtype, false);
  check_kept(op, args.kept, args.shape.batch);
  check_ids(op, args.kept.some, args.shape.batch, args.shape.tokens);
  if (args.made < 0) fail(op, ": ", args.made, " differences");
  check_hidden(op, args.hidden, args.gate, args.out);
  return true;
}

int64_t cache_update_bytes(const CacheUpdateArgs& args) {
  const int64_t read = dtype_size(args.fresh.dtype) * (args.base.data == nullptr ? 1 : 2);
  const int64_t kept = dtype_size(args.kept.dtype) * (2 * args.made + 1);
  return read + kept + (args.hidden.data == nullptr ? 0 : 2 * dtype_size(args.hidden.dtype));
}

void cache_update(const CacheUpdateArgs& args, int64_t threads) {
  if (!check_cache_update(args)) return;
  for_rows(args.shape, cache_update_bytes(args), cache_update_scratch(args.shape.width), threads,
           kernels().cache_update_rows, &args);
}

}  // namespace vivace
