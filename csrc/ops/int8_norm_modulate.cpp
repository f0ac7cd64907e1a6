#include "ops/int8_norm_modulate.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_int8_norm(const char* op, const Int8NormModulateArgs& args) {
  NormModulateArgs norm = args.norm;
  norm.out = norm.hidden;
  if (!check_norm(op, norm)) return false;
  if (args.q == nullptr) fail(op, ": q has no memory");
  if (args.scale == nullptr) fail(op, ": scale has no memory");
  return true;
}

void int8_norm_modulate(const Int8NormModulateArgs& args, int64_t threads) {
  if (!check_int8_norm("int8_norm_modulate", args)) return;
  const int64_t width = args.norm.shape.width;
  for_rows(args.norm.shape, int8_norm_bytes(args.norm.hidden.dtype), int8_norm_scratch(width), threads,
           kernels().int8_norm_modulate_rows, &args);
}

}  // namespace vivace
