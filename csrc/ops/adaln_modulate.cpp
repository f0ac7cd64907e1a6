#include "ops/adaln_modulate.h"

#include "core/error.h"
#include "simd/cpu.h"

namespace vivace {

void adaln_modulate(const AdalnModulateArgs& args, int64_t threads) {
  constexpr const char* kOp = "adaln_modulate";
  if (!check_residual(kOp, args.residual) || !check_norm(kOp, args.norm)) return;
  if (args.norm.out.data == args.residual.out.data) fail(kOp, ": both results go to the same memory");
  const RowShape& shape = args.norm.shape;
  const Dtype dtype = args.norm.hidden.dtype;
  if (args.norm.out.dtype != dtype) fail(kOp, ": out has another dtype");
  for_rows(shape, 3 * dtype_size(dtype) + norm_bytes(dtype), norm_scratch(shape.width) + shape.width, threads,
           kernels().adaln_modulate_rows, &args);
}

}  // namespace vivace
