#include "ops/norm_modulate.h"

#include <cmath>

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

bool check_norm(const char* op, const NormModulateArgs& args) {
  if (!has_rows(op, args.shape)) return false;
  if (!(args.eps >= 0.0) || !std::isfinite(args.eps)) fail(op, ": eps is ", args.eps, "; needs a finite number");
  const Dtype like = args.hidden.dtype;
  check_rows(op, "hidden", args.hidden, like, false);
  check_rows(op, "scale", args.scale, like, true);
  check_rows(op, "shift", args.shift, like, true);
  check_rows(op, "weight", args.weight, like, true);
  check_rows(op, "bias", args.bias, like, true);
  const bool narrow = args.out.dtype == Dtype::kBfloat16;
  check_rows(op, "out", args.out, narrow ? Dtype::kBfloat16 : like, false);
  return true;
}

void norm_modulate(const NormModulateArgs& args, int64_t threads) {
  if (!check_norm("norm_modulate", args)) return;
  const int64_t width = args.shape.width;
  for_rows(args.shape, norm_bytes(args.hidden.dtype), norm_scratch(width), threads, kernels().norm_modulate_rows,
           &args);
}

}  // namespace vivace
