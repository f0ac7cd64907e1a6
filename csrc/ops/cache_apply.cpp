#include "ops/cache_apply.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_cache_apply(const CacheApplyArgs& args) {
  const char* op = "cache_apply";
  if (!has_rows(op, args.shape)) return false;
  check_kept(op, args.kept, args.shape.batch);
  check_ids(op, args.kept.some, args.shape.batch, args.shape.tokens);
  if (args.terms < 1) fail(op, ": ", args.terms, " planes to read");
  if (args.weights == nullptr) fail(op, ": weights has no memory");
  check_rows(op, "out", args.out, args.out.dtype, false);
  check_hidden(op, args.hidden, args.gate, args.out);
  return true;
}

int64_t cache_apply_bytes(const CacheApplyArgs& args) {
  const int64_t kept = dtype_size(args.kept.dtype) * args.terms;
  return kept + dtype_size(args.out.dtype) * (args.hidden.data == nullptr ? 1 : 2);
}

void cache_apply(const CacheApplyArgs& args, int64_t threads) {
  if (!check_cache_apply(args)) return;
  for_rows(args.shape, cache_apply_bytes(args), cache_apply_scratch(args.shape.width), threads,
           kernels().cache_apply_rows, &args);
}

}  // namespace vivace
