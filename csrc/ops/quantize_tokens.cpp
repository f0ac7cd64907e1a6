#include "ops/quantize_tokens.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_quantize(const char* op, const QuantizeTokensArgs& args) {
  if (!has_rows(op, args.shape)) return false;
  check_rows(op, "x", args.x, args.x.dtype, false);
  if (args.q == nullptr) fail(op, ": q has no memory");
  if (args.scale == nullptr) fail(op, ": scale has no memory");
  return true;
}

void quantize_tokens(const QuantizeTokensArgs& args, int64_t threads) {
  if (!check_quantize("quantize_tokens", args)) return;
  for_rows(args.shape, quantize_bytes(args.x.dtype), quantize_scratch(args.shape.width), threads,
           kernels().quantize_tokens_rows, &args);
}

}  // namespace vivace
