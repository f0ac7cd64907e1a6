#include "ops/gated_residual.h"

#include "simd/cpu.h"

namespace vivace {

bool check_residual(const char* op, const GatedResidualArgs& args) {
  if (!has_rows(op, args.shape)) return false;
  const Dtype like = args.hidden.dtype;
  check_rows(op, "hidden", args.hidden, like, false);
  check_rows(op, "update", args.update, like, false);
  check_rows(op, "gate", args.gate, like, true);
  check_rows(op, "hidden_out", args.out, like, false);
  return true;
}

void gated_residual(const GatedResidualArgs& args, int64_t threads) {
  if (!check_residual("gated_residual", args)) return;
  const int64_t bytes = 3 * dtype_size(args.hidden.dtype);
  for_rows(args.shape, bytes, args.shape.width, threads, kernels().gated_residual_rows, &args);
}

}  // namespace vivace
